"""Ours and other programs on the same sizes, one after the other on this machine: speed, memory, start.

    benchmarks/inference/run.sh [--rounds 5] [--models D,M] [--peers llama.cpp,openvino,…] [--threads 2]

setup.sh must have run with the same ERNIE_INFERENCE_CACHE. Each measurement is a process of its own, run alone (quiet.py); the sides take
turns, in reversed order every other round, so that a machine that slows down slows them all. Ratios are taken inside a round. Prints the
tables and writes result.json; record.py makes the dated record of it.

D is ERNIE-4.5-0.3B, M a mixture of experts (models.py). A side that cannot run, or fails, is left out with its reason.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import record
import sides
from models import MODELS

ROOT = sides.ROOT
sys.path.insert(1, str(ROOT / "benchmarks"))
import processor


def arguments():
    def some_of(known):
        def parse(text):
            names = [name for name in text.split(",") if name]
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
            return names
        return parse

    cache = os.environ.get("ERNIE_INFERENCE_CACHE") or ROOT / ".cache" / "inference"
    numbers = lambda text: [int(n) for n in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--models", type=some_of(MODELS), default=list(MODELS), help="default: D,M")
    parser.add_argument("--peers", type=some_of(sides.PEERS), default=list(sides.PEERS), help=f"default: {','.join(sides.PEERS)}")
    parser.add_argument("--ours", type=some_of(sides.OURS), default=list(sides.OURS), help=f"default: {','.join(sides.OURS)}")
    parser.add_argument("--threads", type=int, default=2, help="of every side; default: 2")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt; default: 512")
    parser.add_argument("--decode", type=int, default=128, help="tokens decoded in each stream; default: 128")
    parser.add_argument("--batch", type=numbers, default=[1, 8, 16], help="streams at once; default: 1,8,16")
    parser.add_argument("--first-tokens", type=int, default=3, help="starts timed in a round; default: 3")
    parser.add_argument("--cache", type=Path, default=Path(cache), help="setup.sh's folder; default: ERNIE_INFERENCE_CACHE")
    parser.add_argument("--ernie", type=Path, default=os.environ.get("ERNIE"), help="a program that is built already; default: ERNIE")
    parser.add_argument("--json", type=Path, help="result file; default: result.json in the cache")
    parser.add_argument("--weight", type=int, default=-20, help="autogroup nice value of what is timed; 19 leaves others alone")
    parser.add_argument("--patience", type=float, default=30, help="seconds to wait for idle processors before each process; default: 30")
    options = parser.parse_args()
    options.cache = options.cache.resolve()
    if options.ours and not options.ernie:
        options.ernie = sides.build()
    return options


def compare(options, model):
    """All rounds of one model, as they go into the result file."""
    known, ready, skipped, runs = sides.OURS | sides.PEERS, [], {}, {}
    for name in [*options.ours, *options.peers]:
        side = known[name](name, options)
        try:
            side.check(model)
        except sides.Failed as reason:
            skip(skipped, model, name, reason)
            continue
        ready.append(side)
        runs[name] = []
    for round_ in range(options.rounds):
        for side in ready if round_ % 2 == 0 else reversed(ready):
            if side.name in skipped:
                continue
            try:
                figures = side.measure(model)
            except sides.Failed as reason:
                skip(skipped, model, side.name, reason)
                continue
            runs[side.name].append(figures)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if isinstance(value, (int, float)))
            say(f"round {round_ + 1}, {model} {side.name}: {shown}")
    complete = {name: of for name, of in runs.items() if name not in skipped}
    return {"sides": {name: summary(name, of, complete) for name, of in complete.items()}, "skipped": skipped}


def summary(name, runs, all_runs):
    entry = {figure: spread([run[figure] for run in runs]) for figure in record.FIGURES if figure in runs[0]}
    entry |= {key: runs[0][key] for key in ("versions", "limits") if key in runs[0]}
    if "share_of_limit" in runs[0]:
        shares = {figure: [run["share_of_limit"].get(figure) for run in runs] for figure in runs[0]["share_of_limit"]}
        entry["share_of_limit"] = {figure: statistics.median(values) for figure, values in shares.items() if None not in values}
    if name not in sides.OURS:
        # Ours over the peer's, round by round.
        entry["ratios"] = {ours: ratios(all_runs[ours], runs) for ours in sides.OURS if ours in all_runs}
    elif name == "ernie-w8a8" and "ernie-f32" in all_runs:
        entry["ratios"] = {"ernie-f32": ratios(runs, all_runs["ernie-f32"])}
    return entry | {"runs": runs}


def ratios(numerator, denominator):
    return {figure: spread([a[figure] / b[figure] for a, b in zip(numerator, denominator)])
            for figure in record.FIGURES if figure != "others" and figure in numerator[0] and figure in denominator[0]}


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def skip(skipped, model, side, reason):
    skipped[side] = str(reason)
    say(f"{model} {side} is left out: {reason}")


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = [line.split(":", 1) for line in file if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(lines)}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8")
    flags = facts.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    git = lambda *what: subprocess.run(["git", *what], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return {"date": datetime.date.today().isoformat(), "cpu": processor.name(),
            "family": [facts.get("cpu family"), facts.get("model")], "instructions": [flag for flag in wanted if flag in flags],
            "cpus": os.cpu_count(), "memory_gib": round(memory / 2**30, 1), "kernel": platform.release(),
            "commit": git("rev-parse", "--short", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}


def say(text):
    print(text, file=sys.stderr, flush=True)


def main():
    options = arguments()
    missing = [name for name in options.models if not (options.cache / "models" / name / "model.safetensors").exists()]
    if missing:
        sys.exit(f"there is no checkpoint {missing[0]} in {options.cache}: run benchmarks/inference/setup.sh")
    lengths = {name: getattr(options, name) for name in ("prefill", "decode", "batch", "first_tokens")}
    result = {"machine": machine(), "threads": options.threads, "rounds": options.rounds, "lengths": lengths, "models": {}}
    target = options.json or options.cache / "result.json"
    for model in options.models:
        result["models"][model] = compare(options, model)
        # After each model: a later one may be interrupted.
        target.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(record.tables(result))
    say(f"result in {target}; benchmarks/inference/record.py makes a record of it")


if __name__ == "__main__":
    main()
