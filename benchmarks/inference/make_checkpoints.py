"""Writes model directories with random weights: make_checkpoints.py FOLDER [D M …]. Of a dense model also its Llama of equal sizes.

FOLDER/D/model.safetensors is written tensor by tensor, so it needs little memory and numpy only. A directory that is there is kept, unless
what is made here has changed since.
"""

import json
import math
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy

from models import MODELS, llama_standin, tensors

# Changes whenever what is written changes for the same config.
VERSION = 1
SEED = 20261125
# A tokenizer of this repository's tests: converters insist on one, the ids of the benchmarks are random. Ids above it have no text.
TOKENIZER = Path(__file__).resolve().parents[2] / "testdata" / "tokenizers" / "bpe_bytes.model"
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "add_prefix_space": False,
    "model_max_length": 131072,
}
BYTES = {"BF16": 2, "F32": 4}


def values(random, name, shape):
    drawn = random.standard_normal(shape, dtype=numpy.float32)
    if name.endswith("norm.weight"):
        return 1 + numpy.float32(0.1) * drawn
    # The bias that picks experts is near 0; matrices have the deviation the family starts training with.
    return drawn * numpy.float32(0.01 if name.endswith("e_score_correction_bias") else 0.02)


def to_bf16(values):
    """The upper halves, rounded to nearest, ties to even."""
    bits = values.view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_weights(config, file):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, dtype in tensors(config):
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    random = numpy.random.default_rng(SEED)
    for name, shape, dtype in tensors(config):
        drawn = values(random, name, shape)
        file.write((to_bf16(drawn) if dtype == "BF16" else drawn.astype("<f4")).tobytes())


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_side_files(directory, config):
    write_json(directory / "config.json", config)
    write_json(directory / "tokenizer_config.json", TOKENIZER_CONFIG)
    shutil.copyfile(TOKENIZER, directory / "tokenizer.model")


def make(name, folder):
    config = MODELS[name]
    made_from = {"version": VERSION, "seed": SEED, "config": config}
    directory, llama, stamp = folder / name, folder / f"{name}-llama", folder / f"{name}.made_from.json"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == made_from:
        return
    # What was made from the weights of before is of no use either.
    for old in folder.glob(f"{name}-*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with open(directory / "model.safetensors", "wb") as file:
        write_weights(config, file)
    write_side_files(directory, config)
    if "moe_num_experts" not in config:
        llama.mkdir()
        os.link(directory / "model.safetensors", llama / "model.safetensors")
        write_side_files(llama, llama_standin(config))
    write_json(stamp, made_from)  # last: what was cut off before it is made again


def main():
    if len(sys.argv) < 2 or any(name not in MODELS for name in sys.argv[2:]):
        sys.exit(f"usage: {Path(sys.argv[0]).name} FOLDER [{' '.join(MODELS)}]")
    for name in sys.argv[2:] or MODELS:
        make(name, Path(sys.argv[1]))
        weights = sum(math.prod(shape) for _, shape, _ in tensors(MODELS[name]))
        print(f"{name}: {weights / 1e6:.1f} million weights")


if __name__ == "__main__":
    main()
