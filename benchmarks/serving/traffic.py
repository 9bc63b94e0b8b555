"""Requests to a server with OpenAI's API, as many users would send them, and how they were answered. Standard library only.

Arrivals are a Poisson process; lengths of prompts and answers are log-uniform between two bounds. All of it follows from a seed, so that two servers get
the same requests at the same times.
"""

import asyncio
import json
import math
import random
import time
import urllib.parse
from dataclasses import dataclass, field

WORDS = ("the a little girl boy dog went to house wood sun was warm and they saw old man who said that river bird sang "
         "in morning every day because mother gave him bread water red tree long road small light happy").split()


@dataclass
class Request:
    """What is asked, when, and what the reader does."""

    at: float
    prompt: str
    max_tokens: int
    # Seconds after which the reader leaves; None reads to the end.
    leaves_after: float | None = None
    # Seconds between two reads of a slow reader.
    pause: float = 0.0


@dataclass
class Outcome:
    """How it went. Times in seconds since the request was sent."""

    status: int = 0
    error: str = ""
    first_token: float | None = None
    gaps: list = field(default_factory=list)
    total: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    pieces: int = 0
    left: bool = False


def requests(rate, seconds, seed, prompts=(16, 256), answers=(16, 128), leaving=0.0, slow=0.0):
    """The requests of `seconds` seconds at `rate` a second; `leaving` and `slow` are shares of readers."""
    draw = random.Random(seed)
    log_uniform = lambda low, high: round(math.exp(draw.uniform(math.log(low), math.log(high))))
    at, made = 0.0, []
    while True:
        at += draw.expovariate(rate)
        if at >= seconds:
            return made
        prompt = " ".join(draw.choice(WORDS) for _ in range(log_uniform(*prompts)))
        request = Request(at, prompt, log_uniform(*answers))
        kind = draw.random()
        if kind < leaving:
            request.leaves_after = draw.uniform(0.0, 2.0)
        elif kind < leaving + slow:
            request.pause = draw.uniform(0.01, 0.1)
        made.append(request)


async def send(base, request, extra, key=None, timeout=600.0):
    """Streams one completion."""
    outcome, began = Outcome(), time.monotonic()
    url = urllib.parse.urlsplit(base)
    body = {"prompt": request.prompt, "max_tokens": request.max_tokens, "temperature": 0.8, "seed": 1, "stream": True} | extra
    data = json.dumps(body).encode()
    head = f"POST {url.path.rstrip('/')}/completions HTTP/1.1\r\nhost: {url.netloc}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
    if key:
        head += f"authorization: Bearer {key}\r\n"
    writer = None
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(url.hostname, url.port), timeout)
        writer.write(head.encode() + b"\r\n" + data)
        await writer.drain()
        line = await asyncio.wait_for(reader.readline(), timeout)
        outcome.status = int(line.split()[1]) if len(line.split()) > 1 else 0
        # Headers end with an empty line; a chunked body only adds lines of digits between events.
        while (await asyncio.wait_for(reader.readline(), timeout)).strip():
            pass
        if outcome.status != 200:
            outcome.error = (await asyncio.wait_for(reader.read(2000), timeout)).decode(errors="replace")
            return outcome
        last = None
        while True:
            left = timeout
            if request.leaves_after is not None:
                left = request.leaves_after - (time.monotonic() - began)
                if left <= 0:
                    outcome.left = True
                    return outcome
            try:
                line = await asyncio.wait_for(reader.readline(), left)
            except asyncio.TimeoutError:
                if request.leaves_after is None:
                    raise
                outcome.left = True
                return outcome
            if not line:
                outcome.error = "the stream ended without [DONE]"
                return outcome
            if not line.startswith(b"data: "):
                continue
            text = line[6:].strip()
            if text == b"[DONE]":
                return outcome
            event = json.loads(text)
            if "error" in event:
                outcome.error = json.dumps(event["error"])
                return outcome
            if usage := event.get("usage"):
                outcome.prompt_tokens = usage["prompt_tokens"]
                outcome.completion_tokens = usage["completion_tokens"]
            if any(choice.get("text") for choice in event.get("choices", [])):
                now = time.monotonic()
                if last is None:
                    outcome.first_token = now - began
                else:
                    outcome.gaps.append(now - last)
                last = now
                outcome.pieces += 1
            if request.pause:
                await asyncio.sleep(request.pause)
    except (OSError, asyncio.TimeoutError, ValueError, KeyError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    finally:
        outcome.total = time.monotonic() - began
        if writer is not None:
            writer.close()


async def replay(base, made, extra, key=None, progress=None):
    """Sends each request at its time; returns outcomes in the same order, and the seconds until the last was answered."""
    began = time.monotonic()

    async def one(request):
        await asyncio.sleep(max(0.0, request.at - (time.monotonic() - began)))
        outcome = await send(base, request, extra, key)
        if progress:
            progress(outcome)
        return outcome

    outcomes = await asyncio.gather(*(one(request) for request in made))
    return outcomes, time.monotonic() - began


async def saturate(base, made, extra, streams, key=None):
    """All requests as fast as `streams` readers get them answered; returns outcomes and seconds."""
    waiting, outcomes, began = list(reversed(made)), [], time.monotonic()

    async def reader():
        while waiting:
            outcomes.append(await send(base, waiting.pop(), extra, key))

    await asyncio.gather(*(reader() for _ in range(streams)))
    return outcomes, time.monotonic() - began


def percentile(values, share):
    """The nearest-rank percentile; None of nothing."""
    values = sorted(values)
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1)] if values else None


def summary(outcomes, seconds):
    """What a run came to."""
    answered = [o for o in outcomes if o.status == 200 and not o.error and not o.left]
    first = [o.first_token for o in answered if o.first_token is not None]
    gaps = [gap for o in answered for gap in o.gaps]
    quantiles = lambda values: {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}
    return {
        "requests": len(outcomes), "answered": len(answered), "refused": sum(o.status == 429 for o in outcomes),
        "left": sum(o.left for o in outcomes),
        "errors": [o.error[:200] for o in outcomes if o.error and o.status != 429][:5],
        "seconds": seconds, "requests_per_s": len(answered) / seconds,
        "completion_tokens_per_s": sum(o.completion_tokens or o.pieces for o in answered) / seconds,
        "first_token_s": quantiles(first), "between_tokens_s": quantiles(gaps), "total_s": quantiles([o.total for o in answered]),
    }
