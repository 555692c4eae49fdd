"""How a worker comes by its updates: one fetch for all who miss together, recent ones kept."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

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
    TokenizedRequest,
)
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import load_causal_lm
from lm_workers.worker import LMWorker

CONFIG = EngineConfig(dtype="float32", max_sequences=4, max_batch_tokens=16, cpu_threads=1)


class Source:
    """Gives static updates, once `open` is set, and counts."""

    def __init__(self, spec: UpdateSpec) -> None:
        self._spec = spec
        self.asked: list[int | None] = []
        self.open = asyncio.Event()
        self.open.set()

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        self.asked.append(key.cluster)
        await self.open.wait()
        return LoraDelta.static(key, self._spec)


@pytest.fixture
def source(tiny_llama: Path) -> Source:
    model = load_causal_lm(tiny_llama, torch.float32, "cpu")
    return Source(discover_sites(model, "head", rank=2))


@pytest.fixture
def worker(tiny_llama: Path, source: Source) -> Iterator[LMWorker]:
    spec = source._spec
    engine = build_engine(tiny_llama, CONFIG, (spec, init_bases(spec, seed=0)))
    room = 3 * LoraDelta.static(key(0), spec).nbytes
    one = LMWorker(engine, source, delta_bytes=room)
    yield one
    one.close()


def key(cluster: int) -> AdapterKey:
    return AdapterKey("base", "hyper", cluster, 1)


async def answer(worker: LMWorker, name: str, cluster: int) -> int:
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    request = TokenizedRequest(name, (5, 6), sampling, Assignment(key=key(cluster)))
    return sum([len(chunk.tokens) async for chunk in worker.generate(request)])


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
