#!/usr/bin/env python3
"""Hours in minutes: a server under load with readers that leave and readers that are slow, watched for errors, growth and lost tokens.

    benchmarks/serving/soak.py ERNIE [--model DIR] [--minutes 30] [--load 0.8]

Starts `ERNIE serve` on a free port with a database and a key of its own, measures its saturated rate, then sends requests at `--load` of it. Fails (exit
status 1) if a request is answered with an error, if resident memory after the last tenth of the time is more than 2% above that after the first, or if the tokens in
the usage of the key are not those that the server's own counters have, to the unit, and those of all answers that were read to their end, at least.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import traffic
from process import make_key, resident_kib, serving


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ernie", type=Path)
    parser.add_argument("--model", type=Path, help="default: the built-in one")
    parser.add_argument("--cache-mib", type=int, default=64, help="of the server, so that its cache is full before memory is watched; default: 64")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--load", type=float, default=0.8, help="share of the saturated rate; default: 0.8")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def get(url, key):
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def metric(page, name):
    """The sum of a counter over its labels."""
    values = [float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith((name + " ", name + "{"))]
    return sum(values)


async def main():
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        database = f"sqlite:{folder}/serve.db"
        key, id = make_key(options.ernie, database)
        admin, _ = make_key(options.ernie, database, "admin")
        model = ["--model", options.model] if options.model else []
        with serving(options.ernie, database, "--cache-mib", str(options.cache_mib), *model) as (server, root):
            return await soak(options, server, root, key, id, admin)


async def soak(options, server, root, key, id, admin):
    fields = {"stream_options": {"include_usage": True}}
    made = traffic.requests(1.0, 1e4, options.seed + 1)[:96]
    outcomes, seconds = await traffic.saturate(root + "/v1", made, fields, 16, key)
    rate = options.load * len(outcomes) / seconds
    print(f"saturated {len(outcomes) / seconds:.2f} requests/s; sending {rate:.2f}/s for {options.minutes:g} minutes", flush=True)
    duration = options.minutes * 60
    made = traffic.requests(rate, duration, options.seed, leaving=0.1, slow=0.1)
    samples, began = [], time.monotonic()

    async def watch():
        while True:
            samples.append((time.monotonic() - began, resident_kib(server)))
            await asyncio.sleep(max(1.0, duration / 200))

    watching = asyncio.create_task(watch())
    ran, seconds = await traffic.replay(root + "/v1", made, fields, key)
    watching.cancel()
    # Those that were left at the very end are still being cancelled.
    await asyncio.sleep(3)
    page = get(root + "/metrics", admin)
    rows = json.loads(get(root + "/admin/api/usage?by=key", admin))["data"]
    usage = next(row for row in rows if row["key_id"] == id)
    read = [o for o in outcomes + ran if o.status == 200 and not o.left and not o.error]
    tenth = duration / 10
    early = statistics.median(kib for at, kib in samples if tenth <= at < 2 * tenth)
    late = statistics.median(kib for at, kib in samples if at >= duration - tenth)
    result = traffic.summary(ran, seconds) | {
        "resident_kib": {"second_tenth": early, "last_tenth": late, "growth": late / early - 1},
        "tokens": {
            "usage": {"prompt": usage["prompt_tokens"], "completion": usage["completion_tokens"]},
            "counted": {"prompt": metric(page, "ernie_prompt_tokens_total"), "completion": metric(page, "ernie_output_tokens_total")},
            "read": {"prompt": sum(o.prompt_tokens for o in read), "completion": sum(o.completion_tokens for o in read)},
        },
    }
    print(json.dumps(result, indent=1))
    if options.json:
        curve = {"resident_kib_at_s": [[round(at), kib] for at, kib in samples]}
        options.json.write_text(json.dumps(result | curve, indent=1) + "\n")
    tokens, faults = result["tokens"], []
    if result["errors"] or result["refused"]:
        faults.append(f"{len(result['errors'])} errors, {result['refused']} refused")
    if result["resident_kib"]["growth"] > 0.02:
        faults.append("resident memory grew by more than 2%")
    for kind in ("prompt", "completion"):
        if tokens["usage"][kind] != tokens["counted"][kind]:
            faults.append(f"{kind} tokens: {tokens['usage'][kind]} in the usage, {tokens['counted'][kind]:.0f} computed")
        if tokens["usage"][kind] < tokens["read"][kind]:
            faults.append(f"{kind} tokens: fewer in the usage than were read")
    print("; ".join(faults) or "no fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
