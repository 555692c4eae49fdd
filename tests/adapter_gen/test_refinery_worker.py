"""A refinery that prompts reach at any time, with a real refiner on a small model."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress

import numpy as np
import pytest
import torch

from adapter_gen.codec import decode_delta
from adapter_gen.hypernetwork import Generated
from adapter_gen.refine import Refined
from adapter_gen.refinery import (
    ClusterRefinery,
    CommonConfig,
    Offered,
    RefineryConfig,
)
from adapter_gen.refinery_worker import RefineryWorker
from adapter_gen.update import LoraDelta, Site, UpdateSpec
from cluster_router.wire.errors import DeltaError, SetupError
from cluster_router.wire.types import COMMON, AdapterKey, Conditioning, Place

SPEC = UpdateSpec("head", 4, 8, (Site("head", 8, 8),))
CONFIG = RefineryConfig(
    every=8, buffer=16, max_clusters=2, common=CommonConfig(every=24, buffer=24)
)
ZEROS = Generated(cores=torch.zeros(1, 1, 4, 4), shift=torch.zeros(1, 8))


class Store:
    """In memory; full where told to be."""

    def __init__(self) -> None:
        self.files: dict[Place, list[bytes]] = {}
        self.full = self.gone = False
        self.trimmed: list[tuple[int, list[Place]]] = []

    def save(self, place: Place, data: bytes) -> None:
        if self.gone:
            raise RuntimeError("no credentials")  # as the client of an object store raises
        if self.full:
            raise SetupError("no space left")
        self.files.setdefault(place, []).append(data)

    def trim(self, most: int, held: Collection[Place]) -> None:
        self.trimmed.append((most, list(held)))


class Refiner:
    """Moves by one, or not at all, or fails. The real one has tests of its own."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.fails = False

    def refine(self, prompts, start: Generated | None) -> Refined:
        if self.fails:
            raise DeltaError("a loss of nan")
        start = start or ZEROS
        moved = Generated(cores=start.cores + self.scale, shift=start.shift)
        return Refined(moved, self.scale, 0.1, 1)


def generate(key: AdapterKey, conditioning: Conditioning) -> LoraDelta:
    return LoraDelta.static(key, SPEC)


NEXT = itertools.count()  # no prompt comes twice


@pytest.fixture
def refiner() -> Refiner:
    return Refiner()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
async def worker(refiner: Refiner, store: Store) -> AsyncIterator[RefineryWorker]:
    refinery = ClusterRefinery(
        refiner,  # type: ignore[arg-type]
        refiner,  # type: ignore[arg-type]
        generate,
        lambda key, place: None,
        CONFIG,
    )
    worker = RefineryWorker(refinery, store, SPEC, CONFIG)
    task = asyncio.create_task(worker.run())
    yield worker
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    worker.close()


def prompts(cluster: int, count: int = 8) -> list[Offered]:
    embedding = np.ones(4, np.float32) / 2
    key, seen = AdapterKey("base", "hyper", cluster, 1), Conditioning(embedding, 5.0)
    tokens = [np.full(20, next(NEXT), np.int32) for _ in range(count)]
    return [Offered("", key, seen, one) for one in tokens]


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.005)


def cores(store: Store, cluster: int = 7) -> list[float]:
    """Of every refinement of a cluster, their mean."""
    key = AdapterKey("base", "hyper", cluster, 0, "cafe")
    found = [decode_delta(data, key, SPEC).cores for data in store.files["", cluster]]
    return [float(one.mean()) for one in found if one is not None]


async def test_what_is_refined_is_kept_under_the_next_number(
    worker: RefineryWorker, store: Store
) -> None:
    await worker.offer(prompts(7, 7))
    await asyncio.sleep(0.05)
    assert store.files == {}
    await worker.offer(prompts(7, 1))
    await until(lambda: worker.status().refined == 1)
    assert cores(store) == [1.0]
    await worker.offer(prompts(7))
    await until(lambda: worker.status().refined == 2)
    assert cores(store) == [1.0, 1.0]
    assert worker.status().offered == 16
    await worker.offer(prompts(8))
    await until(lambda: worker.status().refined == 5)
    assert (cores(store, COMMON), cores(store), cores(store, 8)) == ([1.0], [1.0, 1.0, 2.0], [2.0])


async def test_where_nothing_is_gained_nothing_is_kept(
    worker: RefineryWorker, store: Store, refiner: Refiner
) -> None:
    refiner.scale = 0.0
    await worker.offer(prompts(7))
    await until(lambda: worker.status().unchanged == 1)
    assert store.files == {}


async def test_it_goes_on_after_a_failure(
    worker: RefineryWorker, store: Store, refiner: Refiner, caplog: pytest.LogCaptureFixture
) -> None:
    refiner.fails = True
    await worker.offer(prompts(7))
    await until(lambda: worker.status().failed == 1)
    refiner.fails, store.full = False, True
    await worker.offer(prompts(7))
    await until(lambda: worker.status().failed == 2)
    store.full, store.gone = False, True
    await worker.offer(prompts(7))
    await until(lambda: worker.status().failed == 4)
    said = [record.message.partition(": ")[2] for record in caplog.records]
    assert said == ["a loss of nan", "no space left", "no credentials", "no credentials"]
    store.gone = False
    await worker.offer(prompts(7, 16))
    await until(lambda: worker.status().refined == 1)
    assert cores(store) == [2.0], "what was common could not be saved, and is not lost"


async def test_a_number_that_overflows_is_refused(
    worker: RefineryWorker, store: Store, refiner: Refiner
) -> None:
    refiner.scale = float(torch.finfo(torch.float16).max) * 2
    await worker.offer(prompts(7))
    await until(lambda: worker.status().failed == 1)
    assert store.files == {}


async def test_the_store_keeps_no_more_clusters_than_the_refinery(
    worker: RefineryWorker, store: Store
) -> None:
    for cluster in (1, 2, 3):
        await worker.offer(prompts(cluster, 8 if cluster == 3 else 1))
    await until(lambda: worker.status().refined == 1)
    assert store.trimmed == [(2, [("", COMMON), ("", 2), ("", 3)])]
