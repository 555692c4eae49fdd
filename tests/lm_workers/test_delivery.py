"""Chunks of streams: when they wait for each other, and what is in them then."""

from __future__ import annotations

import asyncio

import pytest

from cluster_router.wire.errors import EngineError
from cluster_router.wire.types import TokenChunk
from lm_workers.delivery import Outcome, Streams


def chunk(token: int, finish: bool = False) -> TokenChunk:
    return TokenChunk("r", f"{token} ", (token,), finish_reason="stop" if finish else None)


class Steps:
    """Streams that are told of steps, and the clock that they look at.

    Args:
        chunks_per_s: of the streams.
        names: those that are open, on this loop.
    """

    def __init__(self, chunks_per_s: float | None, *names: str) -> None:
        self.now = 0.0
        self.streams = Streams(chunks_per_s, lambda: self.now)
        self.queues: dict[str, asyncio.Queue[Outcome]] = {name: asyncio.Queue() for name in names}
        for name, queue in self.queues.items():
            self.streams.open(name, asyncio.get_running_loop(), queue)

    async def step(self, took_s: float, **told: Outcome) -> dict[str, list[Outcome]]:
        """What a step brings, and what each stream was sent by it."""
        self.now += took_s
        self.streams.deliver(told.items())
        await asyncio.sleep(0)
        return {name: _taken(queue) for name, queue in self.queues.items() if queue.qsize()}


def _taken(queue: asyncio.Queue[Outcome]) -> list[Outcome]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


async def test_without_a_limit_each_chunk_is_sent_as_it_comes() -> None:
    steps = Steps(None, "a", "b")
    for token in range(3):
        one = chunk(token)
        assert await steps.step(0.001, a=one, b=one) == {"a": [one], "b": [one]}


async def test_the_first_chunk_of_a_stream_waits_for_nothing() -> None:
    steps = Steps(10, "a", "b")
    assert await steps.step(0.01, a=chunk(1)) == {"a": [chunk(1)]}
    assert await steps.step(0.01, a=chunk(2), b=chunk(1)) == {"b": [chunk(1)]}


async def test_what_waits_is_sent_for_all_streams_at_once() -> None:
    steps = Steps(40, "a", "b")  # two streams, of which each may send a chunk in 50 ms
    await steps.step(0.01, a=chunk(0), b=chunk(0))
    for token in range(1, 4):
        assert await steps.step(0.01, a=chunk(token), b=chunk(token)) == {}
    sent = await steps.step(0.01, a=chunk(4))
    assert sent["a"] == [TokenChunk.joined([chunk(token) for token in range(1, 5)])]
    assert sent["b"] == [TokenChunk.joined([chunk(token) for token in range(1, 4)])]
    assert await steps.step(0.01, a=chunk(5)) == {}


async def test_requests_that_have_not_begun_slow_nobody_down() -> None:
    steps = Steps(50, "a", *(f"waiting{number}" for number in range(9)))
    await steps.step(0.01, a=chunk(0))
    assert await steps.step(0.01, a=chunk(1)) == {"a": [chunk(1)]}


@pytest.mark.parametrize(("took_s", "sent_by"), [(0.03, 3), (0.045, 2), (0.3, 1)])
async def test_no_token_waits_longer_than_a_tenth_of_a_second_and_half_a_step(
    took_s: float, sent_by: int
) -> None:
    steps = Steps(0.01, "a")
    await steps.step(0, a=chunk(0))
    found = [bool(await steps.step(took_s, a=chunk(1))) for _ in range(sent_by)]
    assert found == [False] * (sent_by - 1) + [True]


async def test_the_end_of_a_stream_waits_for_nothing() -> None:
    steps = Steps(10, "a", "b")
    await steps.step(0, a=chunk(0), b=chunk(0))
    assert await steps.step(0.01, a=chunk(1), b=chunk(1)) == {}
    last = TokenChunk.joined([chunk(1), chunk(2, finish=True)])
    assert await steps.step(0.01, a=chunk(2, finish=True), b=chunk(2)) == {"a": [last]}
    assert [*steps.streams] == ["b"]


async def test_an_error_is_told_after_the_tokens_before_it() -> None:
    steps = Steps(10, "a", "b")
    lost = EngineError("lost")
    await steps.step(0, a=chunk(0))
    await steps.step(0.01, a=chunk(1))
    sent = await steps.step(0.01, a=lost, b=lost)
    assert sent == {"a": [chunk(1), lost], "b": [lost]}
    assert len(steps.streams) == 0


async def test_it_tells_how_many_streams_have_ended() -> None:
    steps = Steps(None, "a", "b", "c")
    told = {"a": chunk(1), "b": chunk(1, finish=True), "c": EngineError("lost")}
    assert steps.streams.deliver(told.items()) == 2


async def test_a_reader_that_leaves_takes_what_waits_for_it_along() -> None:
    steps = Steps(10, "a", "b")
    await steps.step(0, a=chunk(0), b=chunk(0))
    await steps.step(0.01, a=chunk(1), b=chunk(1))
    assert steps.streams.close("a", steps.queues["a"])
    assert not steps.streams.close("a", steps.queues["a"])
    assert await steps.step(0.1, b=chunk(2)) == {"b": [TokenChunk.joined([chunk(1), chunk(2)])]}


async def test_only_who_opened_a_stream_closes_it() -> None:
    steps = Steps(None, "a")
    again: asyncio.Queue[Outcome] = asyncio.Queue()
    steps.streams.open("a", asyncio.get_running_loop(), again)
    assert not steps.streams.close("a", steps.queues["a"])
    assert steps.streams.close("a", again)


async def test_a_loop_that_is_closed_keeps_nobody_from_being_told() -> None:
    steps = Steps(None, "a")
    closed = asyncio.new_event_loop()
    closed.close()
    steps.streams.open("b", closed, asyncio.Queue())
    assert await steps.step(0.01, b=chunk(1), a=chunk(1)) == {"a": [chunk(1)]}
