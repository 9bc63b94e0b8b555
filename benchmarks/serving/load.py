#!/usr/bin/env python3
"""Throughput and latency of servers with OpenAI's API, under the same requests at the same times.

    benchmarks/serving/load.py --server ernie=http://127.0.0.1:8080/v1 [--server other=http://127.0.0.1:8000/v1] [--rates 0.5,0.7,0.9]

First each server is saturated: all requests with as many readers as --streams. Then requests come as a Poisson process, at the given shares of the first
server's saturated rate or, with --per-second, at these rates. Servers take turns; only one is loaded at a time. Prints a table; --json writes all figures.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

import traffic

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import processor


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL", help="may be given several times")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME=JSON", help="fields that only this server's requests have")
    parser.add_argument("--key", action="append", default=[], metavar="NAME=KEY", help="a server's API key")
    parser.add_argument("--rates", default="0.3,0.6,0.8", help="shares of the first server's saturated rate; default: 0.3,0.6,0.8")
    parser.add_argument("--per-second", help="these rates instead, requests a second")
    parser.add_argument("--seconds", type=float, default=60, help="of arrivals in each run; default: 60")
    parser.add_argument("--saturating", type=int, default=64, help="requests of the saturated run, 0 for none; default: 64")
    parser.add_argument("--streams", type=int, default=16, help="readers of the saturated run; default: 16")
    parser.add_argument("--prompt-words", default="16,256", help="bounds; default: 16,256")
    parser.add_argument("--answer-tokens", default="16,128", help="bounds; default: 16,128")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.saturating or options.per_second):
        parser.error("without a saturated run the rates must be given: --per-second")
    return options


def pair(text):
    name, _, value = text.partition("=")
    return name, value


def line(name, rate, run):
    ms = lambda value: "·" if value is None else f"{value * 1000:.0f}"
    first, gap = run["first_token_s"], run["between_tokens_s"]
    print(f"{name:<14} {rate:>10} {run['requests_per_s']:>9.2f} {run['completion_tokens_per_s']:>9.1f} {ms(first['p50']):>9} {ms(first['p99']):>9} "
          f"{ms(gap['p50']):>7} {ms(gap['p99']):>7} {run['answered']:>5}/{run['requests']:<5} {run['refused']:>4}  {'; '.join(run['errors'])}", flush=True)


async def main():
    options = arguments()
    bounds = lambda text: tuple(int(n) for n in text.split(","))
    sizes = {"prompts": bounds(options.prompt_words), "answers": bounds(options.answer_tokens)}
    servers, keys = dict(map(pair, options.server)), dict(map(pair, options.key))
    extra = {name: json.loads(text) for name, text in map(pair, options.extra)}
    fields = lambda name: {"stream_options": {"include_usage": True}} | extra.get(name, {})
    print(f"{'server':<14} {'rate /s':>10} {'done /s':>9} {'tokens/s':>9} {'first p50':>9} {'p99 ms':>9} {'gap p50':>7} {'p99 ms':>7} {'answered':>11} {'429':>4}")
    made = traffic.requests(1.0, 10.0 * options.saturating, options.seed, **sizes)[:options.saturating]
    result = {"host": processor.name(), "saturated": {}, "poisson": []}
    for name, url in servers.items():
        # A few first, for what a server does only once.
        await traffic.saturate(url, traffic.requests(1.0, 3.0, options.seed + 1000, **sizes), fields(name), 1, keys.get(name))
        if not made:
            continue
        result["saturated"][name] = traffic.summary(*await traffic.saturate(url, made, fields(name), options.streams, keys.get(name)))
        line(name, "saturated", result["saturated"][name])
    if options.per_second:
        rates = [float(rate) for rate in options.per_second.split(",")]
    else:
        rates = [next(iter(result["saturated"].values()))["requests_per_s"] * float(share) for share in options.rates.split(",")]
    for number, rate in enumerate(rates, 1):
        # New prompts each time: what a server keeps of those before is not what is measured.
        made = traffic.requests(rate, options.seconds, options.seed + number, **sizes)
        for name, url in servers.items():
            run = traffic.summary(*await traffic.replay(url, made, fields(name), keys.get(name)))
            result["poisson"].append({"server": name, "rate": rate} | run)
            line(name, f"{rate:.2f}", run)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    failed = [run for run in [*result["saturated"].values(), *result["poisson"]] if run["errors"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
