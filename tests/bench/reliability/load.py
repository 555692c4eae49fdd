"""Callers over HTTP, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

Kind = Literal["done", "refused", "told", "failed", "cut", "unreachable"]
"""Complete; 429 with Retry-After; an error in the stream; any other status; a stream that broke off
without a word; no answer at all."""

NO_LIMIT = httpx.Limits(max_connections=None, max_keepalive_connections=0)


@dataclass(frozen=True)
class Outcome:
    """One request. Times are in seconds, on the monotonic clock."""

    kind: Kind
    begun: float
    ended: float
    first: float | None = None
    status: int = 0
    detail: str = ""
    retry_after: float = 0.0
    adaptation: dict[str, Any] = field(default_factory=dict)

    @property
    def took(self) -> float:
        return self.ended - self.begun


async def ask(http: httpx.AsyncClient, body: dict[str, Any], path: str = "") -> Outcome:
    """Stream one completion to its end."""
    begun, first = time.monotonic(), None
    adaptation: dict[str, Any] = {}

    def outcome(kind: Kind, status: int = 0, detail: str = "", wait: float = 0.0) -> Outcome:
        return Outcome(kind, begun, time.monotonic(), first, status, detail, wait, adaptation)

    try:
        async with http.stream(
            "POST", path or "/v1/completions", json=body | {"stream": True}
        ) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode()
                wait = answer.headers.get("retry-after", "")
                kind: Kind = "refused" if answer.status_code == 429 and wait else "failed"
                return outcome(kind, answer.status_code, text[:300], float(wait or 0))
            async for line in answer.aiter_lines():
                if not line:
                    continue
                first = first or time.monotonic()
                event = line.removeprefix("data: ")
                if event == "[DONE]":
                    return outcome("done", 200)
                parsed = json.loads(event)
                if "error" in parsed:
                    return outcome("told", 200, event)
                adaptation = parsed["adaptation"]
            return outcome("cut", 200, "ended without [DONE]")
    except httpx.HTTPError as error:
        return outcome("unreachable" if first is None else "cut", 0, repr(error))


class Load:
    """Closed-loop callers: each sends its next request when the last has ended.

    Args:
        url: of the application.
        body: makes the body of a caller's next request.
        callers: how many.
        patience: whether a caller who was refused waits as long as it was told.
    """

    def __init__(
        self, url: str, body: Callable[[], dict[str, Any]], callers: int, patience: bool = True
    ) -> None:
        self._url, self._body, self._callers, self._patience = url, body, callers, patience
        self.outcomes: list[Outcome] = []
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Callers call while inside; on leaving, those under way come to their end."""
        async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=NO_LIMIT) as http:
            tasks = [asyncio.create_task(self._call(http)) for _ in range(self._callers)]
            try:
                yield
            finally:
                self._stop.set()
                await asyncio.gather(*tasks)

    async def _call(self, http: httpx.AsyncClient) -> None:
        while not self._stop.is_set():
            outcome = await ask(http, self._body())
            self.outcomes.append(outcome)
            wait = outcome.retry_after if self._patience else 0.0
            if outcome.kind != "done":
                try:
                    async with asyncio.timeout(max(wait, 0.05)):
                        await self._stop.wait()
                except TimeoutError:
                    pass


def counted(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many of each kind."""
    return dict(Counter(one.kind for one in outcomes))


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed; NaN where there is none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else float("nan")
