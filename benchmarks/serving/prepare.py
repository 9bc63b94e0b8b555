#!/usr/bin/env python3
"""Makes a model that can be served out of one of the inference benchmarks: prepare.py MODEL TARGET.

MODEL has random weights and a tokenizer of a few hundred pieces, so that most of the tokens it chooses have no text. TARGET has the same weights (linked)
and that tokenizer with a made-up word for every other id: each token is text, as in a trained model, and prompts are cut up as before, since no real word
is among those.
"""

import json
import os
import shutil
import struct
import sys
from pathlib import Path


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def count_pieces(data):
    """How many entries of field 1 a SentencePiece model has; all of its fields have a length."""
    at = pieces = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 != 2:
            sys.exit(f"not a SentencePiece model: wire type {tag & 7}")
        length, at = read_varint(data, at)
        pieces, at = pieces + (tag >> 3 == 1), at + length
    return pieces


def piece(text, score):
    """ModelProto.SentencePiece: the text, its score, and NORMAL as its type, which is the default."""
    data = text.encode()
    body = b"\x0a" + varint(len(data)) + data + b"\x15" + struct.pack("<f", score)
    return b"\x0a" + varint(len(body)) + body


def main():
    if len(sys.argv) != 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} MODEL TARGET")
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    if target.exists():
        return
    vocab = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    model = (source / "tokenizer.model").read_bytes()
    # Scores far below all others: no merge of real pieces gives way to one of these.
    words = b"".join(piece(f"▁~{id}~", -1e6 - id) for id in range(count_pieces(model), vocab))
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    os.link(source / "model.safetensors", partial / "model.safetensors")
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, partial / name)
    (partial / "tokenizer.model").write_bytes(model + words)
    partial.rename(target)


if __name__ == "__main__":
    main()
