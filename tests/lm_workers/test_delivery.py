"""Chunks of a stream: when they wait for each other, and what is in them then."""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster_router.wire.errors import EngineError
from cluster_router.wire.types import TokenChunk
from lm_workers.delivery import Outcome, next_chunk, put_all


def chunk(token: int, finish: bool = False) -> TokenChunk:
    return TokenChunk("r", f"{token} ", (token,), finish_reason="stop" if finish else None)


def queue(*outcomes: Outcome) -> asyncio.Queue[Outcome]:
    found: asyncio.Queue[Outcome] = asyncio.Queue()
    put_all((found, outcome) for outcome in outcomes)
    return found


def after(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_the_first_chunk_of_a_stream_waits_for_nothing() -> None:
    outcomes = queue(chunk(1), chunk(2))
    assert (await next_chunk(outcomes, None)).tokens == (1,)
    assert outcomes.qsize() == 1


async def test_once_it_is_due_a_chunk_is_sent_as_it_is() -> None:
    outcomes = queue(chunk(1), chunk(2))
    assert (await next_chunk(outcomes, after(0))).tokens == (1,)


async def test_what_comes_before_it_is_due_comes_together() -> None:
    outcomes = queue(chunk(1), chunk(2))
    asyncio.get_running_loop().call_later(0.02, outcomes.put_nowait, chunk(3))
    asyncio.get_running_loop().call_later(0.5, outcomes.put_nowait, chunk(4))
    begun = time.monotonic()
    found = await next_chunk(outcomes, after(0.1))
    assert (found.tokens, found.text, found.finish_reason) == ((1, 2, 3), "1 2 3 ", None)
    assert 0.08 < time.monotonic() - begun < 0.4
    assert (await next_chunk(outcomes, None)).tokens == (4,)


async def test_the_end_of_a_stream_waits_for_nothing() -> None:
    begun = time.monotonic()
    found = await next_chunk(queue(chunk(1), chunk(2, finish=True)), after(30))
    assert (found.tokens, found.finish_reason) == ((1, 2), "stop")
    assert time.monotonic() - begun < 5


async def test_an_error_is_told_after_the_tokens_before_it() -> None:
    outcomes = queue(chunk(1), chunk(2), EngineError("lost"))
    assert (await next_chunk(outcomes, after(30))).tokens == (1, 2)
    with pytest.raises(EngineError, match="lost"):
        await next_chunk(outcomes, after(30))


async def test_a_reader_may_leave_while_tokens_wait() -> None:
    outcomes = queue(chunk(1))
    reader = asyncio.create_task(next_chunk(outcomes, after(30)))
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
