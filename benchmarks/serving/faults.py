#!/usr/bin/env python3
"""What strangers can do to a server, and what others notice of it.

    benchmarks/serving/faults.py ERNIE [--idle 10000] [--bodies 3000] [--slow 200]

Starts `ERNIE serve` on a free port and asks it something, undisturbed first, then beside: connections that say nothing (`--idle`), heads of requests that
come a byte a second (`--slow`), and bodies of every wrong kind (`--bodies`: real requests with pieces cut out, doubled, replaced, and bytes of no meaning).
Prints how long others waited. Fails (exit status 1) if others are not answered, a slow head is not cut off, a body gets another status than 2xx or 4xx, or an error
that is not in OpenAI's shape, if the time that a wrong key takes tells whether there is one of that id (the ranks of times of both kinds differ by more than
four standard errors), if the server ends, or if memory grows by more than 5% when as many connections come a second time.
"""

import argparse
import json
import random
import resource
import socket
import statistics
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from process import make_key, resident_kib, serving

HEADER_TIMEOUT_S = 10
ROUTES = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 2, "n": 1, "stop": ["."], "logit_bias": {"5": 1.0}, "temperature": 0.5, "logprobs": 1},
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 2,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object", "maxProperties": 1}}},
    },
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "float"},
    "/v1/tokenize": {"prompt": "a b"},
    "/v1/detokenize": {"tokens": [5, 6]},
    # One that cannot be made, whatever else is changed: the first key would refuse all the others.
    "/admin/api/keys": {"name": "x", "scopes": ["nothing"], "expires": 5},
}
VALUES = [None, True, 0, -1, 1e308, 2**63, "", "\ud800", "x" * 5000, [], [[]], {}, {"a": {}}, [None], "\u0000", 1.5, "NaN"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ernie", type=Path)
    parser.add_argument("--idle", type=int, default=10000)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--bodies", type=int, default=3000)
    parser.add_argument("--keys", type=int, default=1000, help="wrong keys of either kind; default: 1000")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def ask(root):
    """Seconds that a short completion takes."""
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 4, "seed": 1}).encode()
    began = time.monotonic()
    request = urllib.request.Request(root + "/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        json.load(answer)
    return time.monotonic() - began


def waits(root, times=20):
    took = sorted(ask(root) for _ in range(times))
    return {"median_s": statistics.median(took), "worst_s": took[-1]}


def idle(port, root, count):
    """As many connections as are wanted, or as the system gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    connections, began = [], time.monotonic()
    try:
        while len(connections) < count:
            connections.append(socket.create_connection(("127.0.0.1", port), timeout=30))
        return {"connections": len(connections), "opened_in_s": time.monotonic() - began, **waits(root)}
    finally:
        for connection in connections:
            connection.close()


def slow(port, root, count):
    """Heads that never end; the time after which the server hangs up."""
    connections = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(count)]
    began, head, others, alive = time.monotonic(), b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-a: " + b"a" * 300, None, list(connections)
    for second in range(3 * HEADER_TIMEOUT_S):
        for connection in list(alive):
            try:
                connection.send(head[second:second + 1])
                connection.setblocking(False)
                # An answer or its end: it is over.
                if connection.recv(1) is not None:
                    alive.remove(connection)
            except BlockingIOError:
                connection.setblocking(True)
            except OSError:
                alive.remove(connection)
        if second == 3:
            others = waits(root)
        if not alive:
            break
        time.sleep(max(0.0, began + second + 1 - time.monotonic()))
    ended = time.monotonic() - began
    for connection in connections:
        connection.close()
    return {"connections": count, "left": len(alive), "all_ended_after_s": ended, **(others or {})}


def mutated(draw, value):
    """The same JSON with one thing wrong somewhere."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        value, key = dict(value), draw.choice(list(value))
        kind = draw.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.25:
            value[draw.choice(["x", "", "stream_", "N", "\u0000"])] = draw.choice(VALUES)
        else:
            value[key] = mutated(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.7:
        value, at = list(value), draw.randrange(len(value))
        value[at] = mutated(draw, value[at])
        return value
    return draw.choice(VALUES)


def body(draw, fields):
    data = json.dumps(mutated(draw, fields)).encode()
    kind = draw.random()
    if kind < 0.1:
        data = draw.randbytes(draw.randrange(200))
    elif kind < 0.3 and data:
        at = draw.randrange(len(data))
        data = draw.choice([data[:at], data[:at] + draw.randbytes(3) + data[at + 3:], data[:at] + data[at // 2:at] + data[at:], b"[" * 3000 + data])
    return data


def fuzz(root, count, seed):
    draw, statuses, faults = random.Random(seed), {}, []
    for number in range(count):
        route, fields = draw.choice(list(ROUTES.items()))
        data = body(draw, fields)
        kind = draw.choice(["application/json"] * 8 + ["text/plain", "application/json; charset=utf-16"])
        request = urllib.request.Request(root + route, data, {"content-type": kind}, method=draw.choice(["POST"] * 9 + ["PUT"]))
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        except OSError as error:
            status, text = 0, str(error).encode()
        statuses[status] = statuses.get(status, 0) + 1
        try:
            answer = json.loads(text)
            fits = status < 300 or isinstance(answer["error"]["message"], str)
        except (ValueError, KeyError, TypeError):
            # Of a stream, which a change of `stream` asked for.
            fits = status < 300 and text.startswith(b"data: ")
        if not (200 <= status < 300 or 400 <= status < 500) or not fits:
            faults.append({"route": route, "body": data[:300].decode(errors="replace"), "status": status, "answer": text[:300].decode(errors="replace")})
    return {"bodies": count, "statuses": dict(sorted(statuses.items())), "faults": faults[:5]}


def timed_key(root, key):
    """Seconds until a key is refused."""
    request = urllib.request.Request(root + "/v1/models", headers={"authorization": f"Bearer {key}"})
    began = time.perf_counter()
    try:
        urllib.request.urlopen(request, timeout=30)
        raise RuntimeError("a wrong key was taken")
    except urllib.error.HTTPError as error:
        took = time.perf_counter() - began
        if error.code != 401:
            raise
        return took


def guessed_keys(ernie, root, database, count, seed):
    """Whether a wrong secret of an id that exists takes another time than an id that does not exist: Mann and Whitney's test."""
    draw, (key, _) = random.Random(seed), make_key(ernie, database)
    prefix, id, secret = key.split("_")
    wrong = lambda length: "".join(draw.choice("0123456789abcdef") for _ in range(length))
    times = []
    for _ in range(count):
        pair = [(True, f"{prefix}_{id}_{wrong(len(secret))}"), (False, f"{prefix}_{wrong(len(id))}_{wrong(len(secret))}")]
        draw.shuffle(pair)
        times += [(timed_key(root, key), exists) for exists, key in pair]
    ranks = [rank for rank, (_, exists) in enumerate(sorted(times), 1) if exists]
    u = sum(ranks) - count * (count + 1) / 2
    deviation = (count * count * (2 * count + 1) / 12) ** 0.5
    median = lambda wanted: statistics.median(took for took, exists in times if exists is wanted)
    return {"tries": 2 * count, "known_id_median_s": median(True), "unknown_id_median_s": median(False), "standard_errors": (u - count * count / 2) / deviation}


def main():
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        database = f"sqlite:{folder}/serve.db"
        with serving(options.ernie, database, "--cache-mib", "64") as (server, root):
            port = int(root.rsplit(":", 1)[1])
            result = {"undisturbed": waits(root)}
            result["fuzzed"] = fuzz(root, options.bodies, options.seed)
            result["idle"] = idle(port, root, options.idle)
            result["slow_heads"] = slow(port, root, options.slow)
            # What the allocator keeps of the first time is there for the second.
            before = resident_kib(server)
            result["idle_again"] = idle(port, root, options.idle)
            time.sleep(3)
            result["after"] = waits(root) | {"resident_kib": resident_kib(server), "before_kib": before}
            # The first key: from here on all others are refused.
            result["keys"] = guessed_keys(options.ernie, root, database, options.keys, options.seed)
            result["ended"] = server.poll()
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    faults = [f"a body got {fault['status']}" for fault in result["fuzzed"]["faults"]]
    if result["slow_heads"]["left"] or result["slow_heads"]["all_ended_after_s"] > 2 * HEADER_TIMEOUT_S:
        faults.append("slow heads are not cut off")
    if abs(result["keys"]["standard_errors"]) > 4:
        faults.append("the time that a wrong key takes tells whether there is one of that id")
    if result["ended"] is not None:
        faults.append(f"the server ended with {result['ended']}")
    if result["after"]["resident_kib"] > 1.05 * before:
        faults.append("memory grows with each connection that was")
    print("; ".join(faults) or "no fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
