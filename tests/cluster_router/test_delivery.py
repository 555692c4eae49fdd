from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from cluster_router.delivery import Delivery
from cluster_router.wire.errors import DeadlineError, EngineError, UnavailableError
from cluster_router.wire.types import Assignment, SamplingParams, TokenChunk, TokenizedRequest

ATTEMPTS = 3
Step = Exception | float | str
"""What a replica does next: fail, take so many seconds, or send a text."""


class Replicas:
    """Each call is answered by the next script."""

    def __init__(self, *scripts: list[Step]) -> None:
        self.scripts = list(scripts)
        self.asked: list[str] = []
        self.open = 0

    async def generate(self, request: TokenizedRequest) -> AsyncIterator[TokenChunk]:
        self.asked.append(request.request_id)
        script = self.scripts[len(self.asked) - 1]
        self.open += 1
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield TokenChunk(request.request_id, text=step)
        finally:
            self.open -= 1


def request(timeout_s: float | None = None) -> TokenizedRequest:
    return TokenizedRequest("a", (1,), SamplingParams(), Assignment(None), timeout_s)


def delivery(replicas: Replicas, timeout_s: float | None = None) -> Delivery:
    return Delivery(replicas, ATTEMPTS, pause_s=0.001, timeout_s=timeout_s)


async def text(source: Delivery, timeout_s: float | None = None) -> str:
    return "".join([chunk.text async for chunk in source.generate(request(timeout_s))])


def lost() -> UnavailableError:
    return UnavailableError("An LM replica was lost.")


async def test_what_has_not_begun_is_sent_again_under_another_name() -> None:
    replicas = Replicas([lost()], [0.001, lost()], ["x", "y"])
    assert await text(delivery(replicas)) == "xy"
    assert len(set(replicas.asked)) == 3 and replicas.open == 0


async def test_not_for_ever() -> None:
    replicas = Replicas(*[[lost()] for _ in range(9)])
    with pytest.raises(UnavailableError, match="lost"):
        await text(delivery(replicas))
    assert len(replicas.asked) == ATTEMPTS


async def test_what_has_begun_is_not_sent_again() -> None:
    replicas = Replicas(["x", lost()], ["other"])
    seen = []
    with pytest.raises(UnavailableError, match="lost"):
        async for chunk in delivery(replicas).generate(request()):
            seen.append(chunk.text)
    assert (seen, replicas.asked) == (["x"], ["a"])


async def test_what_is_wanted_whole_is_sent_again_though_it_had_begun() -> None:
    replicas = Replicas(["x", lost()], ["y", "z"])
    whole = replace(request(), whole=True)
    found = [chunk.text async for chunk in delivery(replicas).generate(whole)]
    assert found == ["y", "z"] and replicas.open == 0


@pytest.mark.parametrize("error", [EngineError("no"), ValueError("no"), TimeoutError("no")])
async def test_other_failures_are_not_sent_again(error: Exception) -> None:
    replicas = Replicas([error], ["x"])
    with pytest.raises(type(error), match="no"):
        await text(delivery(replicas))
    assert replicas.asked == ["a"]


@pytest.mark.parametrize(
    ("script", "says"),
    [([60.0], "had not begun within its 0.05 s"), (["x", 60.0], "not complete, within its 0.05 s")],
)
@pytest.mark.parametrize("own", [True, False])
async def test_an_answer_ends_at_its_deadline(script: list[Step], says: str, own: bool) -> None:
    replicas = Replicas(script)
    source = delivery(replicas, 60.0 if own else 0.05)
    begun = time.monotonic()
    with pytest.raises(DeadlineError, match=says):
        await text(source, 0.05 if own else 60.0)
    assert time.monotonic() - begun < 30
    assert replicas.open == 0


async def test_the_deadline_holds_for_all_attempts_together() -> None:
    replicas = Replicas([0.04, lost()], [0.04, lost()], [0.04, "x"])  # each alone is in time
    with pytest.raises(DeadlineError, match="had not begun"):
        await text(delivery(replicas), 0.1)
    assert replicas.open == 0


async def test_a_slow_reader_does_not_outlast_its_deadline() -> None:
    replicas = Replicas(["x"] * 100)
    chunks = delivery(replicas).generate(request(0.05))
    with pytest.raises(DeadlineError):
        async for _ in chunks:
            await asyncio.sleep(0.03)
    assert replicas.open == 0


@pytest.mark.parametrize("leave", ["close", "cancel"])
async def test_leaving_closes_the_replicas_stream(leave: str) -> None:
    replicas = Replicas(["x", 60.0])
    chunks = delivery(replicas).generate(request(60.0))
    assert (await anext(chunks)).text == "x"
    if leave == "close":
        await chunks.aclose()
    else:
        reading = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
    await until(lambda: replicas.open == 0)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not check():
            await asyncio.sleep(0.001)
