"""Our trainer and PyTorch, one after the other on this machine: training speed, memory, and whether the losses are the same.

    benchmarks/training/run.sh [--configs S,M,E,L] [--runs 5] …

All sides start from one checkpoint and see the same batches (prepare.py). Each run is a process of its own; the sides take turns, in
reversed order every other round, so that a machine that slows down slows them all. Ratios are taken inside a round. The first run of a
side takes at least as many steps as losses are compared; float32 losses that differ by more than the tolerance fail the comparison.

`--recompute` puts a second side beside each precision of ours, with layers computed again in the backward pass instead of kept: what that
costs in speed and saves in memory. Its losses are those of the side that keeps them.

Dense losses agree to 1e-5. Of a mixture of experts, rounding decides where two experts score alike, and a token sent elsewhere moves the
loss of later steps: weights changed by 1e-6 move either side's losses by up to 6e-4 in 12 steps, as far as the sides lie apart.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from configs import CONFIGS
from prepare import prepare

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(1, str(HERE.parent))
import processor

PRECISIONS = ("f32", "int8-mixed")
RECOMPUTED = {f"{precision} recomputed": precision for precision in PRECISIONS}
PEERS = ("eager", "compile", "transformers")
COMPARED_STEPS, TOLERANCE = 20, 1e-3
# `batched_mm` is no candidate: it copies each token's experts and needs tens of GB here.
EXPERTS = ("grouped_mm", "eager")


def arguments():
    def some_of(known):
        def parse(text):
            names = text.split(",")
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
            return names
        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=some_of(CONFIGS), default=list(CONFIGS), help="default: %(default)s")
    parser.add_argument("--precisions", type=some_of(PRECISIONS), default=["f32"], help="of ours, f32 and int8-mixed; default: f32")
    parser.add_argument("--recompute", action="store_true",
                        help="also ours with layers computed again in the backward pass, in each precision")
    parser.add_argument("--peers", type=some_of(PEERS), default=list(PEERS), help="default: %(default)s, each where it applies")
    parser.add_argument("--runs", type=int, default=5, help="rounds; default: 5")
    parser.add_argument("--steps", type=int, help="timed steps of a run; default: by configuration")
    parser.add_argument("--threads", type=int, default=2, help="of every side; default: 2")
    parser.add_argument("--clip", type=float, default=0.0, help="clip the gradient's norm on every side; default: no clipping")
    parser.add_argument("--experts", choices=["default", "fastest", *EXPERTS], default="default",
                        help="experts_implementation of transformers; `fastest` tries %s first" % " and ".join(EXPERTS))
    parser.add_argument("--limit-gflops", type=float, help="float32 GFLOP/s the threads can do at most, to print the share reached")
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "bench-training", help="checkpoints, ids and caches")
    parser.add_argument("--json", type=Path, help="result file; default: result.json in the work folder")
    parser.add_argument("--launch", type=shlex.split, default=[], metavar="COMMAND", help="put before each run, like taskset or nice")
    return parser.parse_args()


class Runner:
    """Starts one side on one configuration, returns what it printed."""

    def __init__(self, options):
        self.options = options
        self.ours = build()
        self.environment = os.environ | {"OMP_NUM_THREADS": str(options.threads),
                                         "TORCHINDUCTOR_CACHE_DIR": str(options.work.resolve() / "inductor")}

    def run(self, side, name, warm, steps, experts):
        config, folder = CONFIGS[name], self.options.work / name
        if is_ours(side):
            command = [self.ours, "--precision", RECOMPUTED.get(side, side), "--recompute", "yes" if side in RECOMPUTED else "no"]
        else:
            command = [sys.executable, HERE / "peer.py", "--peer", side, "--experts", experts]
        sizes = {"rows": config.rows, "length": config.length, "warm": warm, "steps": steps, "threads": self.options.threads,
                 "clip": self.options.clip, "model": folder / "model", "ids": folder / "ids.bin"}
        command += [text for key, value in sizes.items() for text in (f"--{key}", value)]
        done = subprocess.run([*self.options.launch, *map(str, command)], stdout=subprocess.PIPE, text=True, env=self.environment)
        if done.returncode != 0:
            sys.exit(f"{label(side)} on {name} failed with status {done.returncode}")
        result = json.loads(done.stdout.splitlines()[-1])
        if result["threads"] != self.options.threads:
            sys.exit(f"{label(side)} ran on {result['threads']} threads")
        say(f"{name} {label(side)}: {result['tokens_per_second']:.1f} tok/s, {result['peak_rss_mib']:.0f} MiB, "
            f"{len(result['losses'])} steps to loss {result['losses'][-1]:.4f}")
        return result


def build():
    """Our example's program, built as this checkout has it."""
    command = ["cargo", "build", "--quiet", "--release", "--locked", "-p", "ernie-train", "--example", "training_speed",
               "--message-format=json-render-diagnostics"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return next(message["executable"] for message in map(json.loads, built.splitlines()) if message.get("executable"))


def fastest_experts(runner, name):
    speeds = {experts: runner.run("transformers", name, 1, 2, experts)["tokens_per_second"] for experts in EXPERTS}
    return max(speeds, key=speeds.get)


def compare(runner, name):
    """All rounds of one configuration, as they go into the result file."""
    options, config = runner.options, CONFIGS[name]
    prepare(name, options.work)
    ours = ours_of(options)
    sides = [*ours, *(peer for peer in config.peers if peer in options.peers)]
    experts = options.experts
    if experts == "fastest" and "transformers" in sides:
        experts = fastest_experts(runner, name)
    runs = {side: [] for side in sides}
    for round_ in range(options.runs):
        steps = options.steps or config.steps
        if round_ == 0:
            steps = max(steps, COMPARED_STEPS - config.warm)
        for side in sides if round_ % 2 == 0 else reversed(sides):
            runs[side].append(runner.run(side, name, config.warm, steps, experts))

    first, flops = sides[0], config.flops_per_token()
    report = {"flops_per_token": flops, "warm": config.warm, "ours": first, "sides": {}}
    for side in sides:
        speed = [run["tokens_per_second"] for run in runs[side]]
        memory = [run["peak_rss_mib"] for run in runs[side]]
        entry = report["sides"][side] = {"tokens_per_second": spread(speed), "peak_rss_mib": spread(memory), "runs": runs[side]}
        entry["gflops"] = flops * entry["tokens_per_second"]["median"] / 1e9
        if options.limit_gflops:
            entry["share_of_limit"] = entry["gflops"] / options.limit_gflops
        entry["loss_difference"] = difference(runs[first][0], runs[side][0])
        if side in PEERS:
            entry["against"] = {
                our: {"speed_ratio": spread([a["tokens_per_second"] / b for a, b in zip(runs[our], speed)]),
                      "rss_ratio": spread([a["peak_rss_mib"] / b for a, b in zip(runs[our], memory)])}
                for our in ours
            }
    return report


def difference(a, b):
    return max(abs(x - y) for x, y in list(zip(a["losses"], b["losses"]))[:COMPARED_STEPS])


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ours_of(options):
    """Our sides: the precisions that were asked for, each recomputed right after it."""
    again = {precision: side for side, precision in RECOMPUTED.items()} if options.recompute else {}
    return [side for precision in options.precisions for side in (precision, again.get(precision)) if side]


def is_ours(side):
    return side in PRECISIONS or side in RECOMPUTED


def label(side):
    return f"ours {side}" if is_ours(side) else f"torch {side}"


def table(name, report):
    config = CONFIGS[name]
    print(f"\n{name}: {config.rows} x {config.length} tokens a step, {report['flops_per_token'] / 1e6:.1f} MFLOP a token")
    print(f"  {'':<28}{'tok/s':>9}{'min':>9}{'max':>9}{'GFLOP/s':>9}{'limit':>7}{'peak MiB':>10}{'max |Δ loss|':>14}")
    ratios = []
    for side, entry in report["sides"].items():
        speed = entry["tokens_per_second"]
        share = f"{entry['share_of_limit']:.0%}" if "share_of_limit" in entry else "-"
        print(f"  {label(side):<28}{speed['median']:>9.1f}{speed['min']:>9.1f}{speed['max']:>9.1f}{entry['gflops']:>9.1f}{share:>7}"
              f"{entry['peak_rss_mib']['median']:>10.0f}{entry['loss_difference']:>14.1e}")
        for ours, against in entry.get("against", {}).items():
            speed, rss = against["speed_ratio"], against["rss_ratio"]
            ratios.append(f"  {label(ours)} / {label(side)}: speed {speed['median']:.3f} ({speed['min']:.3f} to {speed['max']:.3f}), "
                          f"memory {rss['median']:.2f}")
    print("\n".join(ratios), flush=True)


def disagreements(name, report):
    """Sides whose losses are not those of ours in float32. Other precisions are other numbers; their difference is only shown."""
    if report["ours"] != "f32":
        return []
    sides = [side for side in report["sides"] if side in PEERS or RECOMPUTED.get(side) == "f32"]
    compared = [(side, report["sides"][side]["loss_difference"]) for side in sides]
    # Not `>`: NaN does not agree either.
    return [f"{name}: losses of ours f32 and {label(side)} differ by {gap:.1e}, more than {TOLERANCE}"
            for side, gap in compared if not gap <= TOLERANCE]


def machine():
    git = lambda *what: subprocess.run(["git", *what], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return {"date": datetime.date.today().isoformat(), "cpu": processor.name(), "cpus": os.cpu_count(), "kernel": platform.release(),
            "commit": git("rev-parse", "--short", "HEAD"), "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}


def say(text):
    print(text, file=sys.stderr, flush=True)


def main():
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    runner = Runner(options)
    result = {"machine": machine(), "threads": options.threads, "clip": options.clip, "limit_gflops": options.limit_gflops, "configs": {}}
    target = options.json or options.work / "result.json"
    faults = []
    for name in options.configs:
        report = result["configs"][name] = compare(runner, name)
        faults += disagreements(name, report)
        # After each configuration: a later one may be interrupted.
        target.write_text(json.dumps(result, indent=1), encoding="utf-8")
        table(name, report)
    here = result["machine"]
    print(f"\n{here['date']}, commit {here['commit']}{' with changes' if here['modified'] else ''}, {options.threads} threads of "
          f"{here['cpus']} x {here['cpu']}, {options.runs} rounds; result in {target}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
