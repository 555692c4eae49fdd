"""What fails alone, what fails with all beside it, what ends a worker; nobody is left waiting."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.sites import discover_sites
from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import DeltaError, EngineError, RequestError, UnavailableError
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    Conditioning,
    SamplingParams,
    TokenizedRequest,
)
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.engine import Engine, Failure
from lm_workers.models import load_causal_lm
from lm_workers.worker import LMWorker

CONFIG = EngineConfig(dtype="float32", max_sequences=4, max_batch_tokens=16, cpu_threads=1)
LONG = {"max_tokens": 100, "ignore_eos": True}


class Nothing:
    """An adapter source that has nothing."""

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        raise DeltaError("no update here")


def request(name: str, **params: object) -> TokenizedRequest:
    given = {"max_tokens": 8, "temperature": 0, **params}
    sampling = SamplingParams.model_validate(given)
    return TokenizedRequest(name, (5, 6, 7), sampling, Assignment(key=None))


def fail(*args: object, **kwargs: object) -> None:
    raise RuntimeError("broken")


@pytest.fixture
def engine(tiny_llama: Path) -> Engine:
    return build_engine(tiny_llama, CONFIG)


@pytest.fixture
def worker(engine: Engine) -> Iterator[LMWorker]:
    one = LMWorker(engine, Nothing())
    yield one
    one.close()


async def count(worker: LMWorker, one: TokenizedRequest) -> int:
    """How many tokens come."""
    return sum([len(chunk.tokens) async for chunk in worker.generate(one)])


def break_push(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._sequences["bad"].detokenizer, "push", fail)


def break_sampling(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = engine._sampler._edit

    def some(row: torch.Tensor, sequence: object) -> None:
        assert sequence is not bad
        edit(row, sequence)  # type: ignore[arg-type]

    bad = engine._sequences["bad"]
    monkeypatch.setattr(engine._sampler, "_edit", some)


def break_scoring(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    logprob = engine._texts.logprob

    def some(token: int, *more: object) -> object:
        return fail() if token == 5 and more == (None,) else logprob(token, *more)

    monkeypatch.setattr(engine._texts, "logprob", some)


@pytest.mark.parametrize(
    ("spoil", "params"),
    [
        (break_push, {}),
        (break_sampling, {"presence_penalty": 1}),
        (break_scoring, {"prompt_logprobs": 0}),
        (break_scoring, {"prompt_logprobs": 0, "max_tokens": 0}),
    ],
)
def test_a_row_fails_alone(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Engine, pytest.MonkeyPatch], None],
    params: dict[str, object],
) -> None:
    others = [request("greedy"), request("drawn", temperature=1, seed=3, frequency_penalty=1)]

    def answers() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        while engine.has_work:
            for one in engine.step():
                if isinstance(one, Failure):
                    assert one.request_id == "bad" and isinstance(one.error, EngineError)
                    found["bad"] = []
                else:
                    found.setdefault(one.request_id, []).extend(one.tokens)
            engine.check_integrity()
        return found

    for one in others:
        engine.add(one, None)
    alone = answers()
    for one in (others[0], request("bad", **params), others[1]):
        engine.add(one, None)
    spoil(engine, monkeypatch)
    assert answers() == {**alone, "bad": []}


async def test_who_fails_alone_is_told_and_the_others_are_not(
    worker: LMWorker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = asyncio.create_task(count(worker, request("good", **LONG)))
    bad = worker.generate(request("bad", **LONG))
    await anext(bad)
    break_push(engine, monkeypatch)
    with pytest.raises(EngineError, match="at this request"):
        async for _ in bad:
            pass
    assert await good == 100
    assert (await worker.check_integrity()).kv_free == 1


async def test_steps_that_fail_in_a_row_end_the_worker(
    worker: LMWorker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failing = engine.step, True
    monkeypatch.setattr(engine, "step", lambda: fail() if failing else step())
    for number in range(4):  # one request, sent again and again within a moment, is no proof
        with pytest.raises(EngineError):
            await count(worker, request(f"again{number}"))
        assert worker.alive
    failing = False
    await count(worker, request("between"))
    monkeypatch.setattr("lm_workers.worker._BROKEN_S", 0.0)
    for turn in ("fails", "works", "fails", "ends"):
        failing = turn != "works"
        for number in range(1 if turn == "ends" else 2):
            told = await asyncio.gather(
                count(worker, request(f"{turn}{number}")), return_exceptions=True
            )
            assert isinstance(told[0], EngineError if failing else int)
            assert worker.alive or turn == "ends"
    worker._thread.join(10)
    assert not worker.alive
    with pytest.raises(UnavailableError):
        await count(worker, request("late"))
    with pytest.raises(UnavailableError):
        await worker.stats()


async def test_an_update_that_cannot_be_loaded_leaves_nobody_waiting(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = discover_sites(load_causal_lm(tiny_llama, torch.float32, "cpu"), "head", rank=2)
    engine = build_engine(tiny_llama, CONFIG, (spec, init_bases(spec, seed=0)))
    assert engine._scheduler.bank is not None
    worker = LMWorker(engine, Nothing(), spec)
    with monkeypatch.context() as broken:
        broken.setattr(engine._scheduler.bank, "acquire", fail)
        streams = [count(worker, request(f"a{number}", **LONG)) for number in range(6)]
        told = await asyncio.gather(*streams, return_exceptions=True)
    assert all(isinstance(one, EngineError) for one in told)
    assert await count(worker, request("b", ignore_eos=True)) == 8
    await worker.check_integrity()
    worker.close()


@pytest.mark.parametrize("broken", ["abort_all", "abort"])
async def test_whatever_ends_the_thread_every_stream_is_told(
    worker: LMWorker, engine: Engine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    first, second = worker.generate(request("a", **LONG)), worker.generate(request("b", **LONG))
    await asyncio.gather(anext(first), anext(second))
    monkeypatch.setattr(engine, broken, fail)
    if broken == "abort_all":
        monkeypatch.setattr(engine, "step", fail)
    await first.aclose()
    with pytest.raises(UnavailableError):
        async for _ in second:
            pass
    worker._thread.join(10)
    assert not worker.alive


async def test_who_comes_while_the_thread_ends_is_told(
    worker: LMWorker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepping, go_on = threading.Event(), threading.Event()

    def step() -> list[object]:
        stepping.set()
        go_on.wait(10)
        return []

    monkeypatch.setattr(engine, "step", step)
    early = asyncio.create_task(count(worker, request("early")))
    await asyncio.to_thread(stepping.wait, 10)
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    while worker._commands.empty():
        await asyncio.sleep(0.001)
    late = asyncio.create_task(count(worker, request("late")))
    asked = asyncio.create_task(worker.check_integrity())
    while worker._commands.qsize() < 3:
        await asyncio.sleep(0.001)
    go_on.set()
    told = await asyncio.wait_for(
        asyncio.gather(early, late, asked, closing, return_exceptions=True), 10
    )
    assert [type(one) for one in told[:2]] == [UnavailableError] * 2


async def test_a_request_that_the_engine_fails_to_take_fails_alone(
    worker: LMWorker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(engine, "add", fail)
        with pytest.raises(EngineError):
            await count(worker, request("bad"))
    assert await count(worker, request("good", ignore_eos=True)) == 8


async def test_a_caller_whose_loop_is_gone_disturbs_nobody(worker: LMWorker) -> None:
    gone = asyncio.new_event_loop()
    gone.close()
    for one in (request("taken"), request("refused", max_tokens=10**6)):
        worker._send(partial(worker._add, one, None, gone, asyncio.Queue()))
    with pytest.raises(RequestError):
        await count(worker, request("refused too", max_tokens=10**6))
    assert await count(worker, request("good", ignore_eos=True)) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has one niceness")
async def test_the_threads_that_compute_are_nicer_than_the_caller(engine: Engine) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    worker = LMWorker(engine, Nothing(), niceness=3)
    await worker.stats()  # the thread has begun
    assert worker._thread.native_id is not None
    assert os.getpriority(os.PRIO_PROCESS, worker._thread.native_id) == min(19, before + 3)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    worker.close()
