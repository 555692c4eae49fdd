"""Assigners by namespace, and how they follow what is published."""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from cluster_router.clusters import Assigner
from cluster_router.index import FaissIndex
from cluster_router.tenants import TenantAssigners
from cluster_router.wire.errors import SetupError
from cluster_router.wire.snapshot import ClusterSnapshot


class Published:
    """Snapshots by namespace; `broken` namespaces cannot be read."""

    def __init__(self) -> None:
        self.snapshots: dict[str, ClusterSnapshot] = {}
        self.broken: set[str] = set()
        self.reads: list[str] = []

    def newer(self, namespace: str, version: int) -> ClusterSnapshot | None:
        self.reads.append(namespace)
        if namespace in self.broken:
            raise SetupError(f"cannot list {namespace}")
        found = self.snapshots.get(namespace)
        return found if found is not None and found.version > version else None


@pytest.fixture
def published() -> Published:
    return Published()


@pytest.fixture
def make(make_snapshot: Callable[..., ClusterSnapshot]) -> Callable[[str], Assigner]:
    bundle = make_snapshot(np.eye(2, 8), version=1)
    return lambda _: Assigner(bundle, FaissIndex, "base", "hyper")


@pytest.fixture
def tenants(make: Callable[[str], Assigner], published: Published) -> TenantAssigners:
    return TenantAssigners(make, published.newer, max_namespaces=2)


async def test_a_namespace_sees_its_own_clusters_only(
    tenants: TenantAssigners, published: Published, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    for name, first in (("a", 1000), ("b", 2000)):
        published.snapshots[name] = make_snapshot(np.eye(3, 8), version=4, first_id=first)
        tenants.of(name)
    await tenants.refresh(tenants.namespaces())
    ids = {name: [info.id for info in tenants.of(name).table()[1]] for name in ("", "a", "b")}
    assert ids == {"": [10, 20], "a": [1000, 1010, 1020], "b": [2000, 2010, 2020]}


async def test_an_assignment_outlives_the_snapshot_it_was_made_under(
    tenants: TenantAssigners, published: Published, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    query = np.eye(2, 8, dtype=np.float32)[0]
    admitted = tenants.of("").assign(query)
    published.snapshots[""] = make_snapshot(np.eye(1, 8), version=2, first_id=90)
    await tenants.refresh([""])
    assert tenants.of("").assign(query).cluster == 90
    assert (admitted.cluster, admitted.key.version, admitted.snapshot_version) == (10, 1, 1)
    assert np.array_equal(admitted.conditioning.vector, [0, 1, 2])


async def test_an_older_snapshot_is_never_taken_up(
    tenants: TenantAssigners, published: Published, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    published.snapshots[""] = make_snapshot(np.eye(3, 8), version=5)
    tenants.load()
    published.snapshots[""] = make_snapshot(np.eye(1, 8), version=4)
    await tenants.refresh([""])
    assert tenants.of("").snapshot.version == 5


async def test_what_cannot_be_read_hinders_nobody_else(
    tenants: TenantAssigners,
    published: Published,
    make_snapshot: Callable[..., ClusterSnapshot],
    caplog: pytest.LogCaptureFixture,
) -> None:
    published.broken.add("a")
    for name in ("a", "b"):
        tenants.of(name)
        published.snapshots[name] = make_snapshot(np.eye(3, 8), version=3)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            await tenants.refresh(["a", "b"])
    assert len(caplog.records) == 1, "once, not with every look"
    assert [tenants.of(name).snapshot.version for name in ("a", "b")] == [1, 3]
    published.broken.clear()
    await tenants.refresh(["a", "b"])
    assert tenants.of("a").snapshot.version == 3


async def test_only_so_many_namespaces_are_held(tenants: TenantAssigners) -> None:
    for name in ("a", "b", "a", "c", "d"):
        tenants.of(name)
    assert tenants.namespaces() == ["", "c", "d"]


async def test_one_that_was_forgotten_is_read_again(
    tenants: TenantAssigners, published: Published, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    published.snapshots["a"] = make_snapshot(np.eye(3, 8), version=3)
    for others in ((), ("b", "c", "d")):
        for name in others:
            tenants.of(name)
        assert tenants.of("a").snapshot.version == 1
        assert (await tenants.ready("a")).snapshot.version == 3


async def test_those_who_ask_at_once_share_one_reading(
    tenants: TenantAssigners, published: Published, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    published.snapshots["a"] = make_snapshot(np.eye(3, 8), version=3)
    ready = await asyncio.gather(*(tenants.ready("a") for _ in range(5)))
    assert {assigner.snapshot.version for assigner in ready} == {3}
    await tenants.ready("a")
    assert published.reads == ["a"]


async def test_one_forgotten_while_it_is_read_is_not_read_twice(
    tenants: TenantAssigners, published: Published, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    published.snapshots["a"] = make_snapshot(np.eye(3, 8), version=3)
    for name in ("a", "b", "c", "a"):
        tenants.of(name)
    assert (await tenants.ready("a")).snapshot.version == 3
    assert published.reads.count("a") == 1


async def test_a_reading_that_takes_long_is_not_waited_for(
    make: Callable[[str], Assigner], make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    goes_on = threading.Event()

    def read(*_: object) -> ClusterSnapshot:
        assert goes_on.wait(5)
        return make_snapshot(np.eye(3, 8), version=3)

    tenants = TenantAssigners(make, read, patience_s=0.05)
    for _ in range(2):
        assert (await tenants.ready("a")).snapshot.version == 1
    assert not goes_on.is_set(), "both came back before it ended"
    goes_on.set()
    async with asyncio.timeout(5):
        while tenants.of("a").snapshot.version != 3:
            await asyncio.sleep(0.005)


async def test_all_are_followed(
    tenants: TenantAssigners, published: Published, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    task = asyncio.create_task(tenants.follow(interval_s=0.02))
    try:
        for version in (2, 3):
            for name in ("", "a"):
                published.snapshots[name] = make_snapshot(np.eye(3, 8), version=version)
            async with asyncio.timeout(5):
                while {tenants.of(name).snapshot.version for name in ("", "a")} != {version}:
                    await asyncio.sleep(0.005)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_where_nothing_is_learned_all_keep_the_bundles(
    make: Callable[[str], Assigner],
) -> None:
    tenants = TenantAssigners(make)
    tenants.of("a")
    await tenants.refresh(tenants.namespaces())
    assert [tenants.of(name).snapshot.version for name in ("", "a")] == [1, 1]


async def test_a_store_that_hangs_leaves_other_threads_alone(
    make: Callable[[str], Assigner],
) -> None:
    release = threading.Event()

    def hang(namespace: str, version: int) -> None:
        release.wait(60)

    tenants = TenantAssigners(make, hang, patience_s=0.01)
    try:
        for number in range(64):  # more than any executor of the loop's own has threads
            await tenants.ready(f"tenant-{number}")
        async with asyncio.timeout(10):
            await asyncio.to_thread(tenants.of("").table)
    finally:
        release.set()
