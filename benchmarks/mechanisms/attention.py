"""What the mechanisms of attention cost and save at inference: attention.py ERNIE FOLDER [--rounds N] [--out DIR].

Makes models with random weights in FOLDER and runs `ernie bench` on them in turn, round after round: speed of a prompt of 8,192 tokens, memory of keys
and values after 8,192, and what a token's attention to 4,096 earlier ones takes: the time of a token there less that at the beginning of a text. A model
differs from the one that it is compared with in nothing but `ernie_rs` of its configuration: there is one with a key/value head for each query head, and
one with a key/value head for four. Prints medians with quartiles, and ratios of the medians. With --out, DIR gets attention.json, every round of it, and
attention.svg, a picture. Needs numpy; run it on an idle machine.
"""

import argparse
import datetime
import html
import json
import math
import os
import statistics
import struct
import subprocess
import sys
from pathlib import Path

import numpy

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import processor

TOKENS = 48
BASE = {
    "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "use_bias": False, "tie_word_embeddings": True,
}
LOCAL = ["sliding_attention"] * 6
# The benchmark's tokens pass through the vocabulary evenly: one in 64 ends a paragraph that is long enough.
PARAGRAPHS = {"end_tokens": list(range(0, 8192, 64)), "min_tokens": 32, "max_tokens": 256}
GATES = {"context_gate": {"threshold": 0.5}}
GROUPED = {"num_key_value_heads": 2}
MODELS = {  # the model that it is compared with, what is not as in BASE, its `ernie_rs`
    "full": ("full", {}, {}),
    "local-global": ("full", {}, {"sliding_window": 128, "layer_types": LOCAL + ["full_attention"] * 2}),
    "local-paragraph": ("full", {}, {"sliding_window": 128, "paragraphs": PARAGRAPHS, "layer_types": LOCAL + ["paragraph_attention"] * 2}),
    "gated": ("full", {}, GATES),
    "grouped": ("grouped", GROUPED, {}),
    "grouped-gated": ("grouped", GROUPED, GATES),
}
# The figures of a round: headings of the picture, and digits.
FIGURES = {"prefill": ("prompt, tok/s", 0), "memory": ("keys and values, MiB", 1), "token": ("token, ms", 3), "attention": ("its attention, ms", 3)}
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


def write(folder, changed, own):
    folder.mkdir(parents=True, exist_ok=True)
    config = BASE | changed | ({"ernie_rs": own} if own else {})
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


def spread(values):
    low, median, high = (float(value) for value in numpy.percentile(values, [25, 50, 75]))
    return {"median": median, "quartiles": [low, high]}


def svg(result):
    """Bars of the medians with lines from quartile to quartile, a panel for each figure."""
    models = result["models"]
    row, bar, left, width = 22, 14, 130, 420
    lines, y = [], 56
    for key, (heading, digits) in FIGURES.items():
        lines.append(f'<text x="10" y="{y}" font-weight="bold">{heading}</text>')
        y += 10
        most = max(max(model[key]["quartiles"][1], model[key]["median"]) for model in models.values()) or 1
        place = lambda value: left + width * max(value, 0) / most
        for name, model in models.items():
            middle, (low, high) = model[key]["median"], model[key]["quartiles"]
            fill = "#8a8f98" if model["compared_with"] == name else "#3b6ea8"
            lines += [
                f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{html.escape(name)}</text>',
                f'<rect x="{left}" y="{y}" width="{place(middle) - left:.1f}" height="{bar}" fill="{fill}"/>',
                f'<line x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y + bar / 2}" y2="{y + bar / 2}" stroke="#c0392b" stroke-width="2"/>',
                f'<text x="{place(max(middle, high)) + 6:.1f}" y="{y + 12}">{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})</text>',
            ]
            y += row
        y += 24
    titles = [f"prompt of {result['prompt']:,} tokens, a token after {result['context']:,}: medians of {result['rounds']} rounds, quartiles in red",
              f"{result['date']}, {result['version']}, {result['processor']}"]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 180}" height="{y}" font-family="sans-serif" font-size="12">'
    lines = [f'<text x="10" y="{16 + 16 * place}">{html.escape(title)}</text>' for place, title in enumerate(titles)] + lines
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>"]) + "\n"


def table(result):
    models = result["models"]
    yield (f"| model | prompt of {result['prompt']}, tok/s | | keys and values after {result['prompt']}, MiB | | token at {result['context']}, ms | "
           "its attention, ms | | ratios to |")
    yield "|---|--:|--:|--:|--:|--:|--:|--:|---|"
    for name, model in models.items():
        other = models[model["compared_with"]]
        ratio = lambda key: f"{model[key]['median'] / other[key]['median']:.2f}×" if other[key]["median"] > 0 else "-"

        def cell(key):
            digits, (low, high) = FIGURES[key][1], model[key]["quartiles"]
            median = f"{model[key]['median']:,.{digits}f}"
            # Memory is the same in every round.
            return median if low == high else f"{median} ({low:,.{digits}f}–{high:,.{digits}f})"

        yield (f"| {name} | {cell('prefill')} | {ratio('prefill')} | {cell('memory')} | {ratio('memory')} | {cell('token')} | "
               f"{cell('attention')} | {ratio('attention')} | {model['compared_with']} |")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ernie", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for attention.json and attention.svg")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of the prompt, and of the text whose memory is asked for")
    parser.add_argument("--context", type=int, default=4096, help="tokens before the token whose attention is measured")
    arguments = parser.parse_args()
    for name, (_, changed, own) in MODELS.items():
        write(arguments.folder / name, changed, own)
    version = subprocess.run([str(arguments.ernie), "--version"], check=True, capture_output=True, text=True).stdout.strip()
    runs = {name: [] for name in MODELS}
    for number in range(arguments.rounds):
        for name, found in runs.items():
            model = arguments.folder / name
            short, far = bench(arguments.ernie, model, 512, 8), bench(arguments.ernie, model, arguments.prompt, arguments.context)
            memory = bench(arguments.ernie, model, 512, arguments.prompt)["kv_cache_mib"] if number == 0 else found[0]["memory"]
            ms = lambda output: 1e3 / output["decode"]["1"]["tokens_per_s"]
            found.append({"prefill": far["prefill"]["tokens_per_s"], "memory": memory, "token": ms(far), "attention": ms(far) - ms(short)})
            print(f"round {number + 1}, {name}: {found[-1]}", flush=True)
    result = {
        "date": datetime.date.today().isoformat(), "version": version, "processor": processor.name(), "logical_cpus": os.cpu_count(),
        "rounds": arguments.rounds, "prompt": arguments.prompt, "context": arguments.context,
        "models": {
            name: {"compared_with": MODELS[name][0], "num_key_value_heads": (BASE | MODELS[name][1])["num_key_value_heads"], "ernie_rs": MODELS[name][2]}
            | {key: spread([run[key] for run in found]) for key in FIGURES} | {"rounds": found}
            for name, found in runs.items()
        },
    }
    print("", *table(result), sep="\n")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "attention.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (arguments.out / "attention.svg").write_text(svg(result), encoding="utf-8")


if __name__ == "__main__":
    main()
