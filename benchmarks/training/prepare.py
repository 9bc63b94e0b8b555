"""Makes what both sides start from: a model directory with random weights, and token ids."""

import json
import shutil
from pathlib import Path

from configs import CONFIGS, VOCABULARY

SEED = 20261124
# More than any run takes; a longer one is refused.
BATCHES = 512
# Changes whenever what is made below changes, so that a work folder of before is not believed.
VERSION = 1


def prepare(name, work: Path):
    """The folder `work/NAME` with `model/` and `ids.bin`, made unless it is there."""
    config, directory = CONFIGS[name], work / name
    made_from = json.dumps({"version": VERSION, "seed": SEED, "batches": [BATCHES, config.rows, config.length],
                            "config": config.huggingface()})
    stamp = directory / "made_from.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == made_from:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "model").mkdir(parents=True)
    write_model(config, directory / "model")
    tokens(config).tofile(directory / "ids.bin")
    stamp.write_text(made_from, encoding="utf-8")  # last: what was cut off before it is made again
    return directory


def write_model(config, directory):
    import numpy
    from safetensors.numpy import save_file

    random = numpy.random.default_rng(SEED)
    h, tensors = config.hidden, {}

    def matrix(name, rows, columns):
        tensors[f"{name}.weight"] = random.standard_normal((rows, columns), dtype=numpy.float32) * numpy.float32(0.02)

    def norm(name):
        tensors[f"{name}.weight"] = numpy.ones(h, dtype=numpy.float32)

    def swiglu(name, width):
        matrix(f"{name}.gate_proj", width, h)
        matrix(f"{name}.up_proj", width, h)
        matrix(f"{name}.down_proj", h, width)

    matrix("model.embed_tokens", VOCABULARY, h)
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm")
        norm(f"{prefix}.post_attention_layernorm")
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            matrix(f"{prefix}.self_attn.{projection}", h, h)
        if config.is_moe_layer(layer):
            e = config.experts
            matrix(f"{prefix}.mlp.gate", e.count, h)
            tensors[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = numpy.zeros((1, e.count), dtype=numpy.float32)
            for expert in range(e.count):
                swiglu(f"{prefix}.mlp.experts.{expert}", e.width)
            swiglu(f"{prefix}.mlp.shared_experts", e.width * e.shared)
        else:
            swiglu(f"{prefix}.mlp", config.intermediate)
    norm("model.norm")
    matrix("lm_head", VOCABULARY, h)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.huggingface(), indent=2), encoding="utf-8")


def tokens(config):
    """Rows of `length` + 1 ids with something to learn: frequencies fall as 1/rank, and every second token on average is the one that
    always follows its predecessor when it is not drawn freely."""
    import numpy

    random = numpy.random.default_rng(SEED)
    shape = (BATCHES * config.rows, config.length + 1)
    frequency = 1.0 / numpy.arange(1, VOCABULARY + 1)
    names = random.permutation(VOCABULARY)
    rows = names[random.choice(VOCABULARY, size=shape, p=frequency / frequency.sum())]
    follower, follows = names[random.permutation(VOCABULARY)], random.random(shape) < 0.5
    for position in range(1, shape[1]):
        rows[:, position] = numpy.where(follows[:, position], follower[rows[:, position - 1]], rows[:, position])
    return rows.astype("<u4")
