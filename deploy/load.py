"""A load on a running service: streamed requests from clients that each wait for their answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from cluster_router.wire.errors import ChameleonError
from deploy.cli.service import check, event_of, headers_of, reached

PERCENTILES = (50, 90, 99)


@dataclass
class Outcome:
    """One request.

    Attributes:
        sent: when, in seconds of `time.perf_counter`.
        arrivals: when each chunk with text came, likewise.
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these, not computed again.
        tokens: tokens of the answer.
        adaptation: what adapted it: `cluster`, `static`, `off`, or `fallback`.
        error: why it failed, None if it did not.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    adaptation: str = ""
    error: str | None = None


@dataclass(frozen=True)
class Load:
    """`requests` requests from `concurrency` clients, over `prompts` in turn.

    `fields` are further fields of every request.
    """

    prompts: Sequence[str]
    requests: int
    concurrency: int
    fields: Mapping[str, Any]


async def run_load(
    url: str, key: str | None, load: Load, done: Callable[[], object]
) -> list[Outcome]:
    """Send `load` to the service at `url`; `done` is called at the end of every request.

    Raises:
        UnavailableError: nothing answers there. What fails later is told in its outcome.
    """
    limits = httpx.Limits(max_connections=load.concurrency)
    timeout = httpx.Timeout(None, connect=10)
    client = httpx.AsyncClient(
        base_url=url, headers=headers_of(key), limits=limits, timeout=timeout
    )
    async with client:
        with reached(url):
            check((answer := await client.get("/v1/models")).status_code, answer.content)
        waiting = iter(range(load.requests))
        outcomes: list[Outcome] = []

        async def send_in_turn() -> None:
            for number in waiting:
                prompt = load.prompts[number % len(load.prompts)]
                outcomes.append(await _send(client, url, {"prompt": prompt, **load.fields}))
                done()

        await asyncio.gather(*(send_in_turn() for _ in range(load.concurrency)))
    return outcomes


async def _send(client: httpx.AsyncClient, url: str, fields: Mapping[str, Any]) -> Outcome:
    outcome = Outcome(time.perf_counter())
    body = {**fields, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with reached(url):
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.is_error:
                    check(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    if (event := event_of(line)) is not None:
                        _note(outcome, event)
    except ChameleonError as error:
        outcome.error = str(error)
    outcome.ended = time.perf_counter()
    return outcome


def _note(outcome: Outcome, event: Mapping[str, Any]) -> None:
    if any(choice["text"] for choice in event["choices"]):
        outcome.arrivals.append(time.perf_counter())
    if found := event.get("adaptation"):
        outcome.adaptation = "fallback" if found["fallback"] else found["mode"]
    if usage := event.get("usage"):
        outcome.prompt_tokens = usage["prompt_tokens"]
        outcome.tokens = usage["completion_tokens"]
        outcome.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures of a run, JSON values only. Latencies are in milliseconds.

    `itl_ms` is the time between chunks of one answer, `tpot_ms` from its first chunk to its last
    for each token after the first: where a chunk holds several tokens the two differ.
    """
    good = [one for one in outcomes if one.error is None]
    failed = Counter(one.error for one in outcomes if one.error is not None)
    began = min((one.sent for one in outcomes), default=0.0)
    seconds = max((one.ended for one in outcomes), default=0.0) - began
    told = [one for one in good if one.arrivals]
    tokens = sum(one.tokens for one in good)
    return {
        "requests": len(outcomes),
        "failed": sum(failed.values()),
        "errors": dict(failed.most_common(3)),
        "seconds": round(seconds, 3),
        "requests_per_s": _rate(len(good), seconds),
        "prompt_tokens": sum(one.prompt_tokens for one in good),
        "cached_tokens": sum(one.cached_tokens for one in good),
        "output_tokens": tokens,
        "output_tokens_per_s": _rate(tokens, seconds),
        "adaptation": dict(Counter(one.adaptation for one in good).most_common()),
        "ttft_ms": _percentiles([one.arrivals[0] - one.sent for one in told]),
        "itl_ms": _percentiles([gap for one in told for gap in np.diff(one.arrivals)]),
        "tpot_ms": _percentiles(
            [
                (one.arrivals[-1] - one.arrivals[0]) / (one.tokens - 1)
                for one in told
                if one.tokens > 1
            ]
        ),
        "latency_ms": _percentiles([one.ended - one.sent for one in good]),
    }


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 2) if seconds else 0.0


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None of nothing."""
    if not len(seconds):
        return None
    values = 1000 * np.asarray(seconds)
    found = {f"p{p}": round(float(np.percentile(values, p)), 2) for p in PERCENTILES}
    return {"mean": round(float(values.mean()), 2), **found}
