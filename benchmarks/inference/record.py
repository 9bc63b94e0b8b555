"""The dated record of a result: record.py [RESULT.json] [FILE.md]; default: the cache's result.json, benchmarks/records/DATE-inference.md.

`-` for FILE.md prints it. A record that is there is not overwritten.
"""

import json
import os
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Figure: heading, digits, factor. The batches are added from the result.
FIGURES = {
    "prefill": ("prefill tok/s", 0, 1),
    **{f"decode_{streams}": (f"decode {streams}", 1, 1) for streams in (1, 2, 4, 8, 16, 32, 64)},
    "first_token_s": ("first token ms", 0, 1e3),
    "load_s": ("load s", 2, 1),
    "peak_rss_mib": ("peak MiB", 0, 1),
    "others": ("others' CPU", 2, 1),
}
INTRODUCTION = """\
Prefill: one prompt of {prefill} tokens, tok/s. Decode N: {decode} tokens in each of N streams with short prompts, summed over the streams. First
token: from the start of the process to its end after a prompt of 16 tokens, its files in the cache; Python's imports are part of it. Load:
until a prompt can be given, as each program measures it itself (llama.cpp: until its first evaluation has ended). Peak: resident memory of the
process that measured speed, the largest where there are several; pages of mapped files count. Others' CPU: the most that other processes used
of one core during a run. Medians over the rounds ({rounds}), smallest and largest in brackets."""


def cell(entry, figure):
    if figure not in entry:
        return "-"
    _, digits, factor = FIGURES[figure]
    return with_range(entry[figure], digits, factor)


def with_range(spread, digits, factor=1):
    median, low, high = (f"{factor * spread[key]:.{digits}f}" for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}-{high})"


def row(cells):
    return "| " + " | ".join(cells) + " |"


def header(cells):
    return [row(cells), "|---|" + "--:|" * (len(cells) - 1)]


def shown_figures(sides):
    return [figure for figure in FIGURES if any(figure in entry for entry in sides.values())]


def speed_table(sides):
    figures = shown_figures(sides)
    return header(["", *(FIGURES[figure][0] for figure in figures)]) + [
        row([name, *(cell(entry, figure) for figure in figures)]) for name, entry in sides.items()]


def ratio_table(sides):
    figures = [figure for figure in shown_figures(sides) if figure != "others"]
    lines = []
    for name, entry in sides.items():
        for other, of in entry.get("ratios", {}).items():
            # In a peer's entry ours is on top; in our own the other precision is below.
            title = f"{other} / {name}" if not name.startswith("ernie-") else f"{name} / {other}"
            shown = [with_range(of[figure], 2) if figure in of else "-" for figure in figures]
            lines.append(row([title, *shown]))
    return header(["ratio", *(FIGURES[figure][0] for figure in figures)]) + lines if lines else []


def share_lines(sides):
    for name, entry in sides.items():
        if "limits" in entry:
            limits = ", ".join(f"{key} {value:.0f}" for key, value in entry["limits"].items())
            shares = ", ".join(f"{FIGURES[figure][0].removesuffix(' tok/s')} {share:.0%}" for figure, share in entry["share_of_limit"].items())
            yield f"{name}: limits {limits}; reached of them: {shares}."


def tables(result):
    lines = []
    for model, report in result["models"].items():
        lines += [f"## {model}", ""]
        if report["sides"]:
            lines += [*speed_table(report["sides"]), ""]
        if ratios := ratio_table(report["sides"]):
            lines += ["Larger is better for speeds, smaller for first token, load and peak.", "", *ratios, ""]
        for line in share_lines(report["sides"]):
            lines += [line, ""]
        for name, reason in report["skipped"].items():
            lines += [f"Left out: {name}: {reason}", ""]
    return "\n".join(lines)


def document(result):
    here, lengths = result["machine"], result["lengths"]
    versions = {}
    for report in result["models"].values():
        for entry in report["sides"].values():
            versions |= entry.get("versions", {})
    family, model = here["family"]
    title = f"# Inference beside other programs, {here['date']}"
    machine = (f"{result['threads']} threads of {here['cpus']} × {here['cpu']} (family {family}, model {model}; {', '.join(here['instructions'])}), "
               f"{here['memory_gib']} GiB, Linux {here['kernel']}; commit {here['commit']}{' with changes' if here['modified'] else ''}.")
    peers = "Beside it: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + "." if versions else ""
    introduction = INTRODUCTION.format(rounds=result["rounds"], **lengths)
    how = ("`benchmarks/inference/run.sh`; D is ERNIE-4.5-0.3B, M a mixture of experts with 663 million weights, all random. Weights have 8 bits"
           " unless a name says otherwise (llama.cpp: Q8_0); openvino runs a Llama of the same sizes.")
    paragraphs = (textwrap.fill(text, 150, break_long_words=False) for text in (machine, peers, how, introduction) if text)
    return "\n\n".join((title, *paragraphs, tables(result))).rstrip() + "\n"


def main():
    cache = Path(os.environ.get("ERNIE_INFERENCE_CACHE") or ROOT / ".cache" / "inference")
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else cache / "result.json"
    result = json.loads(source.read_text(encoding="utf-8"))
    target = sys.argv[2] if len(sys.argv) > 2 else ROOT / "benchmarks" / "records" / f"{result['machine']['date']}-inference.md"
    if target == "-":
        print(document(result), end="")
        return
    with open(target, "x", encoding="utf-8") as file:
        file.write(document(result))
    print(target)


if __name__ == "__main__":
    main()
