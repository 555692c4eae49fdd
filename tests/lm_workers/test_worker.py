from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import DeltaError, EngineError, OverloadedError, UnavailableError
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    Conditioning,
    SamplingParams,
    TokenChunk,
    TokenizedRequest,
)
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.runner import ModelRunner, StepOutput
from lm_workers.sequence import Batch
from lm_workers.worker import LMWorker


class Refuser:
    """An adapter source that has nothing, and counts."""

    def __init__(self) -> None:
        self.asked = 0

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        self.asked += 1
        raise DeltaError("no update here")


def request(name: str, prompt: tuple[int, ...] = (5, 6, 7), **params: object) -> TokenizedRequest:
    sampling = SamplingParams.model_validate({"max_tokens": 8, "temperature": 0, **params})
    return TokenizedRequest(name, prompt, sampling, Assignment(key=None))


@pytest.fixture
def worker(tiny_llama: Path) -> Iterator[LMWorker]:
    config = EngineConfig(
        dtype="float32", max_sequences=4, max_batch_tokens=16, max_queued=8, cpu_threads=1
    )
    one = LMWorker(build_engine(tiny_llama, config), Refuser())
    yield one
    one.close()


async def text(worker: LMWorker, one: TokenizedRequest) -> str:
    return "".join([chunk.text async for chunk in worker.generate(one)])


async def test_streams_run_side_by_side(worker: LMWorker) -> None:
    alone = [await text(worker, request(f"a{i}", (5, 6 + i))) for i in range(8)]
    together = await asyncio.gather(*(text(worker, request(f"b{i}", (5, 6 + i))) for i in range(8)))
    assert alone == together
    assert worker.load == (0, 0)


async def test_tokens_share_chunks_where_more_would_come_than_may(
    worker: LMWorker, tiny_llama: Path
) -> None:
    asked = request("a", max_tokens=60, ignore_eos=True, logprobs=0)
    [*single] = [chunk async for chunk in worker.generate(asked)]
    assert [len(chunk.tokens) for chunk in single] == [1] * 60
    config = EngineConfig(dtype="float32", max_sequences=4, max_batch_tokens=16, cpu_threads=1)
    paced = LMWorker(build_engine(tiny_llama, config), Refuser(), chunks_per_s=20)
    try:
        begun = time.monotonic()
        chunks = [chunk async for chunk in paced.generate(asked)]
        taken = time.monotonic() - begun
    finally:
        paced.close()
    # One stream may send a chunk in 50 ms: its first alone, then what came in the meantime.
    assert len(chunks[0].tokens) == 1
    assert len(chunks) < 30 and len(chunks) <= 3 + taken / 0.05
    assert TokenChunk.joined(chunks) == TokenChunk.joined(single)


async def test_a_stream_that_has_ended_counts_no_more_though_its_reader_lingers(
    worker: LMWorker,
) -> None:
    stream = worker.generate(request("a"))
    while (await anext(stream)).finish_reason is None:
        pass
    stats = await worker.check_integrity()
    assert (stats.running, stats.waiting) == (0, 0)
    await stream.aclose()


async def test_closing_a_stream_aborts_the_request(worker: LMWorker) -> None:
    stream = worker.generate(request("a", max_tokens=100, ignore_eos=True))
    await anext(stream)
    assert worker.load == (1, 0)
    await stream.aclose()
    await text(worker, request("b"))  # the abort is ahead of it in the queue
    assert worker.load == (0, 0)


async def test_cancelling_the_reader_aborts_the_request(worker: LMWorker) -> None:
    task = asyncio.create_task(text(worker, request("a", max_tokens=100, ignore_eos=True)))
    while worker.load == (0, 0):
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await text(worker, request("b"))
    assert worker.load == (0, 0)


async def test_refusals_come_before_the_first_chunk(worker: LMWorker) -> None:
    long = {"max_tokens": 110, "ignore_eos": True}
    streams = [worker.generate(request(f"r{i}", **long)) for i in range(40)]
    firsts = await asyncio.gather(*(anext(one) for one in streams), return_exceptions=True)
    refused = [one for one in firsts if isinstance(one, BaseException)]
    assert refused and all(isinstance(one, OverloadedError) for one in refused)
    assert len(refused) < 40
    await asyncio.gather(*(one.aclose() for one in streams))


async def test_an_update_that_cannot_be_had_fails_its_request_alone(worker: LMWorker) -> None:
    key = AdapterKey("b", "h", 3, 1)
    adapted = TokenizedRequest("a", (5,), SamplingParams(), Assignment(key=key))
    with pytest.raises(DeltaError, match="no update here"):
        await text(worker, adapted)
    assert await text(worker, request("b"))


async def test_a_failed_step_fails_its_requests_and_the_worker_goes_on(
    worker: LMWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ModelRunner.step

    def broken(runner: ModelRunner, batch: Batch) -> StepOutput:
        if any(span.sequence.request_id == "bad" for span in batch.spans):
            raise MemoryError
        return step(runner, batch)

    monkeypatch.setattr(ModelRunner, "step", broken)
    with pytest.raises(EngineError, match="please retry"):
        await text(worker, request("bad"))
    assert await text(worker, request("good"))
    assert worker.alive


async def test_a_name_in_use_is_refused_and_its_owner_is_not_disturbed(worker: LMWorker) -> None:
    first = worker.generate(request("same", max_tokens=20, ignore_eos=True))
    await anext(first)
    with pytest.raises(ValueError, match="in use"):
        await text(worker, request("same"))
    assert len([chunk async for chunk in first]) == 19


async def test_close_ends_open_streams_and_later_ones(tiny_llama: Path) -> None:
    config = EngineConfig(dtype="float32", max_sequences=4, max_batch_tokens=16, cpu_threads=1)
    worker = LMWorker(build_engine(tiny_llama, config), Refuser())
    stream = worker.generate(request("a", max_tokens=100, ignore_eos=True))
    await anext(stream)
    worker.close()
    with pytest.raises(UnavailableError):
        async for _ in stream:
            pass
    with pytest.raises(UnavailableError):
        await text(worker, request("b"))


async def refusals(worker: LMWorker, burst: str) -> list[float]:
    """What those are told, one after the other, who are refused of 40 that come at once."""
    all_here = threading.Event()
    worker._send(all_here.wait)  # until then the engine makes no step, so that none ends before
    streams = [worker.generate(request(f"{burst}{i}", ignore_eos=True)) for i in range(40)]
    coming = [asyncio.ensure_future(anext(one)) for one in streams]
    await asyncio.sleep(0)  # each sends its request
    all_here.set()
    firsts = await asyncio.gather(*coming, return_exceptions=True)
    await asyncio.gather(*(one.aclose() for one in streams))
    return [one.retry_after for one in firsts if isinstance(one, OverloadedError)]


async def test_each_who_is_refused_is_told_a_turn_of_its_own(worker: LMWorker) -> None:
    now = time.monotonic()
    worker._turns._ends.extend(
        now - 4 * ago for ago in range(32, 0, -1)
    )  # one end each four seconds
    told = await refusals(worker, "a")
    assert 8 * 4 <= told[0] < 8 * 4 + 2, "eight wait"
    before_the_last = [wait for wait in told if wait < 60]
    assert len(before_the_last) == 7
    assert np.diff(before_the_last) == pytest.approx(4, abs=0.5)
    assert set(told) == {*before_the_last, 60}, "nobody waits longer"
    worker._turns._returns[:] = [now] * 7  # the time of all of them has come
    assert (await refusals(worker, "b"))[0] < 8 * 4 + 2


async def test_the_pace_is_that_of_an_engine_for_which_others_wait(worker: LMWorker) -> None:
    told = await refusals(worker, "a")
    assert told[0] == 1.0 and max(told) <= 0.1 * 40, "nothing is known of its pace"
    long_ago = time.monotonic() - 1000
    worker._turns._ends.extend(long_ago + second for second in range(32))
    await text(worker, request("alone"))
    assert max(await refusals(worker, "b")) <= 0.1 * (40 + len(told))


async def test_an_idle_engine_remembers_its_pace_and_owes_nobody_a_turn(worker: LMWorker) -> None:
    now = time.monotonic()
    worker._turns._ends.extend(now - 4 * ago for ago in range(32, 0, -1))
    assert max(await refusals(worker, "a")) == 60
    await text(worker, request("alone"))
    assert 8 * 4 <= (await refusals(worker, "b"))[0] < 8 * 4 + 2


async def test_integrity_is_checked_between_steps(worker: LMWorker) -> None:
    long = {"max_tokens": 110, "ignore_eos": True}
    streams = [worker.generate(request(f"r{i}", **long)) for i in range(4)]
    await asyncio.gather(*(anext(one) for one in streams))
    stats = await worker.check_integrity()
    assert stats.running and stats.kv_free < 1
    await asyncio.gather(*(one.aclose() for one in streams))
    stats = await worker.check_integrity()
    assert (stats.running, stats.waiting, stats.kv_free) == (0, 0, 1)
    worker._streams.open("lost", asyncio.get_running_loop(), asyncio.Queue())
    with pytest.raises(AssertionError):
        await worker.check_integrity()
