"""How a worker comes by its updates: one fetch for all who miss together, recent ones kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.sites import discover_sites
from adapter_gen.update import LoraDelta, UpdateSpec
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
from lm_workers.models import load_causal_lm
from lm_workers.worker import LMWorker

CONFIG = EngineConfig(dtype="float32", max_sequences=4, max_batch_tokens=16, cpu_threads=1)

PATIENCE = 0.3
STATIC = AdapterKey("base", "hyper", None, 0)


class Source:
    """Gives updates of ones, once `open` is set, or `failure`, and counts."""

    def __init__(self, spec: UpdateSpec) -> None:
        self._spec = spec
        self.asked: list[int | None] = []
        self.open = asyncio.Event()
        self.open.set()
        self.failure: Exception | None = None
        self.value = 1.0
        self.instead: str | None = None

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        self.asked.append(key.cluster)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        if self.instead is not None:
            key = replace(key, refinement=self.instead)
        static = LoraDelta.static(key, self._spec)
        assert static.cores is not None
        return replace(static, cores=np.full_like(static.cores, self.value))


@pytest.fixture
def source(tiny_llama: Path) -> Source:
    model = load_causal_lm(tiny_llama, torch.float32, "cpu")
    return Source(discover_sites(model, "head", rank=2))


@pytest.fixture
def worker(tiny_llama: Path, source: Source) -> Iterator[LMWorker]:
    spec = source._spec
    engine = build_engine(tiny_llama, CONFIG, (spec, init_bases(spec, seed=0)))
    room = 3 * LoraDelta.static(key(0), spec).nbytes
    one = LMWorker(engine, source, spec, delta_bytes=room, patience_s=PATIENCE)
    yield one
    one.close()


def key(cluster: int) -> AdapterKey:
    return AdapterKey("base", "hyper", cluster, 1)


async def chunks(worker: LMWorker, name: str, of: AdapterKey) -> list[TokenChunk]:
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logprobs=0)
    request = TokenizedRequest(name, (5, 6), sampling, Assignment(key=of))
    return [chunk async for chunk in worker.generate(request)]


async def answer(worker: LMWorker, name: str, cluster: int) -> int:
    return sum(len(chunk.tokens) for chunk in await chunks(worker, name, key(cluster)))


def told(found: list[TokenChunk]) -> tuple[AdapterKey | None, list[float | None]]:
    """Which update stood in, and the log-probabilities of the answer."""
    assert all(chunk.stand_in is None for chunk in found[1:])
    return found[0].stand_in, [entry.logprob for chunk in found for entry in chunk.logprobs]


async def test_requests_that_miss_together_share_one_fetch(
    worker: LMWorker, source: Source
) -> None:
    source.open.clear()
    waiting = [asyncio.create_task(answer(worker, f"a{i}", i % 2)) for i in range(8)]
    await asyncio.sleep(0.05)
    waiting[0].cancel()  # the first to ask goes away; those behind it are served all the same
    source.open.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:] == [2] * 7
    assert sorted(source.asked) == [0, 1]


async def test_resident_names_the_most_recently_used(worker: LMWorker, source: Source) -> None:
    for number, cluster in enumerate([0, 1, 2, 0, 3]):
        await answer(worker, f"a{number}", cluster)
    assert worker.resident == tuple(key(cluster).id for cluster in [2, 0, 3])
    await answer(worker, "again", 0)
    assert source.asked == [0, 1, 2, 3]
    assert worker.resident[-1] == key(0).id


async def test_the_static_update_is_asked_of_nobody(worker: LMWorker, source: Source) -> None:
    stand_in, _ = told(await chunks(worker, "a", STATIC))
    assert stand_in is None
    assert source.asked == []


async def test_who_waits_too_long_runs_under_the_static_update_and_says_so(
    worker: LMWorker, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    _, static = told(await chunks(worker, "static", STATIC))
    source.open.clear()
    clock = asyncio.get_running_loop().time
    begun = clock()
    late = asyncio.create_task(chunks(worker, "late", key(1)))
    await asyncio.sleep(PATIENCE / 2)
    assert told(await chunks(worker, "joins", key(1))) == (STATIC, static)
    assert told(await late) == (STATIC, static)
    assert PATIENCE <= clock() - begun < 10 * PATIENCE
    # With more patience, and a fetch that began long ago, one that waits anew is told from a slow
    # machine.
    worker._patience_s = 10.0
    fetch = worker._fetching[key(1).id]
    worker._fetching[key(1).id] = replace(fetch, begun=clock() - 11.0)
    begun = clock()
    assert told(await chunks(worker, "at once", key(1))) == (STATIC, static)
    assert clock() - begun < 10.0, "the time is the fetch's, not each request's"
    assert source.asked == [1], "and it is still under way"
    assert len(caplog.records) == 1

    source.open.set()
    await asyncio.sleep(0.05)
    stand_in, own = told(await chunks(worker, "in time", key(1)))
    assert stand_in is None
    assert own != static
    assert source.asked == [1]


async def test_a_request_of_another_bundle_runs_under_this_ones_static_update(
    tiny_llama: Path, source: Source
) -> None:
    spec = source._spec
    engine = build_engine(tiny_llama, CONFIG, (spec, init_bases(spec, seed=0)))
    worker = LMWorker(engine, source, spec, hypernetwork="newer")
    own = replace(STATIC, hypernetwork="newer")
    try:
        _, static = told(await chunks(worker, "own static", own))
        assert told(await chunks(worker, "its cluster", key(1))) == (own, static)
        assert told(await chunks(worker, "its static", STATIC)) == (own, static)
        assert source.asked == []
        stand_in, logprobs = told(await chunks(worker, "own", replace(own, cluster=1, version=1)))
        assert stand_in is None and logprobs != static
    finally:
        worker.close()


@pytest.mark.parametrize("failure", [RuntimeError("the generator died"), None])
async def test_an_update_that_fails_or_is_poisoned_is_never_applied(
    worker: LMWorker, source: Source, failure: Exception | None
) -> None:
    _, static = told(await chunks(worker, "static", STATIC))
    source.failure, source.value = failure, float("nan")
    assert told(await chunks(worker, "bad", key(1))) == (STATIC, static)
    assert worker.resident == ()
    source.failure, source.value = None, 1.0
    stand_in, own = told(await chunks(worker, "good", key(1)))
    assert stand_in is None
    assert own != static
    assert source.asked == [1, 1], "the next request asks again"


async def test_what_stands_in_for_a_lost_refinement_is_told_and_not_kept(
    worker: LMWorker, source: Source
) -> None:
    refined = replace(key(1), version=0, refinement="cafe")
    source.instead, source.value = "instead-of-it", 2.0
    for name in "ab":
        stand_in, instead = told(await chunks(worker, name, refined))
        assert stand_in == replace(refined, refinement="instead-of-it")
    source.instead, source.value = None, 1.0
    stand_in, own = told(await chunks(worker, "c", refined))
    assert stand_in is None and own != instead
    assert source.asked == [1, 1, 1]
    assert told(await chunks(worker, "d", refined)) == (None, own)
    assert source.asked == [1, 1, 1], "the refined one is kept"
