"""What the mechanisms of attention cost and save at inference: attention.py ERNIE FOLDER [--rounds N].

Makes models with random weights that differ in nothing but `ernie_rs` of their configuration, in FOLDER, and runs `ernie bench` on them in turn, round
after round: speed of a prompt of 8,192 tokens, memory of keys and values after 8,192, and what a token's attention to 4,096 earlier ones takes: the time
of a token there less that at the beginning of a text. Prints medians, and ratios to full attention. Needs numpy; run it on an idle machine.
"""

import argparse
import json
import math
import statistics
import struct
import subprocess
from pathlib import Path

import numpy

LONG, CONTEXT, TOKENS = 8192, 4096, 48
BASE = {
    "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "use_bias": False, "tie_word_embeddings": True,
}
LOCAL = ["sliding_attention"] * 6
# The benchmark's tokens pass through the vocabulary evenly: one in 64 ends a paragraph that is long enough.
PARAGRAPHS = {"end_tokens": list(range(0, 8192, 64)), "min_tokens": 32, "max_tokens": 256}
MODELS = {
    "full": {},
    "local-global": {"sliding_window": 128, "layer_types": LOCAL + ["full_attention"] * 2},
    "local-paragraph": {"sliding_window": 128, "paragraphs": PARAGRAPHS, "layer_types": LOCAL + ["paragraph_attention"] * 2},
    "gated": {"context_gate": {"threshold": 0.5}},
}
# Of the gates of random weights: W x has a standard deviation of 1 for normed x, so that Phi(bias) of the heads are open.
ACTIVE = 0.65


def tensors(config):
    """Names and shapes; the deviation of the values, or their value and no deviation."""
    h, i, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    own = config.get("ernie_rs", {})
    yield "model.embed_tokens.weight", (config["vocab_size"], h), 0, 0.02
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (h,), 1, 0
        for part, rows in [("q_proj", heads * d), ("k_proj", kv * d), ("v_proj", kv * d)]:
            yield f"{name}.self_attn.{part}.weight", (rows, h), 0, 0.02
        yield f"{name}.self_attn.o_proj.weight", (h, heads * d), 0, 0.02
        yield f"{name}.post_attention_layernorm.weight", (h,), 1, 0
        for part, shape in [("gate_proj", (i, h)), ("up_proj", (i, h)), ("down_proj", (h, i))]:
            yield f"{name}.mlp.{part}.weight", shape, 0, 0.02
        if own.get("layer_types", ["full_attention"] * 99)[layer] == "paragraph_attention":
            yield f"{name}.self_attn.paragraph_pool.weight", (kv, d), 0, 0.1
        if "context_gate" in own:
            gate = f"{name}.self_attn.context_gate"
            yield f"{gate}.weight", (heads, h), 0, 1 / math.sqrt(h)
            yield f"{gate}.bias", (heads,), statistics.NormalDist().inv_cdf(ACTIVE), 0
            yield f"{gate}.density", (heads,), 0, 0
            yield f"{gate}.decay", (1,), 2.2, 0
    yield "model.norm.weight", (h,), 1, 0


def write(folder, own):
    folder.mkdir(parents=True, exist_ok=True)
    config = BASE | ({"ernie_rs": own} if own else {})
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _, _ in tensors(config):
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (_, shape, mean, deviation) in enumerate(tensors(config)):
            drawn = numpy.random.default_rng(number).standard_normal(shape, dtype=numpy.float32)
            file.write((mean + deviation * drawn).astype("<f4").tobytes())


def bench(ernie, model, prompt, context):
    command = [ernie, "bench", "--model", model, "--weights", "int8", "--pp", prompt, "--tg", TOKENS, "--context", context, "--batch", 1,
               "--repeat", 2, "--json"]
    return json.loads(subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ernie", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for name, own in MODELS.items():
        write(arguments.folder / name, own)
    runs = {name: [] for name in MODELS}
    for number in range(arguments.rounds):
        for name, found in runs.items():
            model = arguments.folder / name
            short, far = bench(arguments.ernie, model, 512, 8), bench(arguments.ernie, model, LONG, CONTEXT)
            memory = bench(arguments.ernie, model, 512, LONG)["kv_cache_mib"] if number == 0 else found[0]["memory"]
            ms = lambda output: 1e3 / output["decode"]["1"]["tokens_per_s"]
            found.append({"prefill": far["prefill"]["tokens_per_s"], "memory": memory, "token": ms(far), "attention": ms(far) - ms(short)})
            print(f"round {number + 1}, {name}: {found[-1]}", flush=True)
    median = {name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()}
    print(f"\n| model | prompt of {LONG}, tok/s | | keys and values after {LONG}, MiB | | token at {CONTEXT}, ms | its attention, ms | |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    full = median["full"]
    for name, own in median.items():
        ratio = lambda key: f"{own[key] / full[key]:.2f}×"
        print(f"| {name} | {own['prefill']:,.0f} | {ratio('prefill')} | {own['memory']:.1f} | {ratio('memory')} | {own['token']:.3f} | "
              f"{own['attention']:.3f} | {ratio('attention')} |")


if __name__ == "__main__":
    main()
