"""Learning and publishing behind an event loop, with a disk that can fail."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cluster_router.learning.config import LearnerConfig
from cluster_router.learning.tenants import TenantLearners, newer, reader
from cluster_router.learning.worker import LearnerWorker
from cluster_router.wire.errors import SetupError
from cluster_router.wire.snapshot import ClusterSnapshot

DIM = 24
CONFIG = LearnerConfig(window=256, interval=64, split_gain=0.05)


def prompts(number: int, count: int = 128) -> np.ndarray:
    noise = np.random.default_rng(number).normal(size=(count, DIM)) * 0.04
    return (np.eye(DIM)[number] + noise).astype(np.float32)


@pytest.fixture
def bundle() -> ClusterSnapshot:
    centroids = np.eye(DIM, dtype=np.float32)[:2]
    return ClusterSnapshot(
        version=1,
        ids=np.array([0, 1]),
        centroids=centroids,
        sizes=np.full(2, 50),
        versions=np.ones(2, int),
        conditioning=centroids,
        mean=centroids.mean(0),
        threshold=0.7,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "clusters"


@pytest.fixture
def worker(bundle: ClusterSnapshot, folder: Path) -> Iterator[LearnerWorker]:
    worker = LearnerWorker(TenantLearners(bundle, str(folder), CONFIG, max_namespaces=2))
    yield worker
    worker.close()


def stored(folder: Path, namespace: str = "") -> ClusterSnapshot | None:
    return newer(str(folder), namespace, 0)


async def test_each_namespace_is_published_when_it_has_learned(
    worker: LearnerWorker, folder: Path
) -> None:
    await worker.learn([("", prompts(5)), ("a", prompts(6))])
    assert stored(folder) is None
    await worker.publish()
    first = stored(folder)
    assert first is not None and stored(folder, "a") is not None
    await worker.learn([("a", prompts(7))])
    await worker.publish()
    assert stored(folder).version == first.version
    assert stored(folder, "a").version == first.version + 1
    assert (worker.status().learned, worker.status().namespaces) == (384, 2)


async def test_the_loop_publishes_by_itself(worker: LearnerWorker, folder: Path) -> None:
    task = asyncio.create_task(worker.publish_every(0.02))
    try:
        await worker.learn([("", prompts(5))])
        async with asyncio.timeout(5):
            while stored(folder) is None:
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_while_nothing_can_be_saved_learning_goes_on(
    worker: LearnerWorker, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await worker.learn([("", prompts(5))])
    folder.write_text("in the way")
    with caplog.at_level(logging.ERROR):
        for number in (6, 7, 8):
            await worker.learn([("", prompts(number))])
            await worker.publish()
    assert len(caplog.records) == 1, "once, not with every attempt"
    [failure] = worker.status().failures
    assert str(folder) in failure
    folder.unlink()
    await worker.publish()
    assert worker.status().failures == ()
    nearest = stored(folder).centroids.max(0)  # how near a cluster is to each topic
    assert nearest[5:9].min() > 0.9, "all four new topics are known"


async def test_what_cannot_be_learned_from_is_counted(
    worker: LearnerWorker, caplog: pytest.LogCaptureFixture
) -> None:
    bad = np.full((3, DIM), np.nan, np.float32)
    with caplog.at_level(logging.ERROR):
        await worker.learn([("a", prompts(5)), ("a", bad), ("b", prompts(6)), ("c", prompts(7))])
    assert len(caplog.records) == 2
    status = worker.status()
    assert (status.learned, status.refused, status.namespaces) == (256, 131, 2)
    assert "NaN" in caplog.text and "max_namespaces" in caplog.text


async def test_publishing_goes_on_whatever_a_stores_client_raises(
    worker: LearnerWorker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.learn([("", prompts(5)), ("a", prompts(6))])
    broken = worker._learners._tenant("").store

    def fail(_: object) -> None:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(broken, "save", fail)
    await worker.publish()
    assert stored(folder) is None and stored(folder, "a") is not None
    assert worker.status().failures == ("no credentials",)
    monkeypatch.undo()
    await worker.publish()
    assert stored(folder) is not None and worker.status().failures == ()


def publish(bundle: ClusterSnapshot, folder: Path, *numbers: int) -> ClusterSnapshot:
    """What a learner that starts anew publishes after some topics."""
    learners = TenantLearners(bundle, str(folder), CONFIG)
    for number in numbers:
        learners.learn("", prompts(number))
        learners.publish()
    return learners.publish()


def test_a_version_that_was_damaged_is_not_given_again(
    bundle: ClusterSnapshot, folder: Path
) -> None:
    """Routers may hold it: its keys must not come to mean other weights."""
    damaged = publish(bundle, folder, 5, 6)
    [last] = folder.glob(f"*/snapshot-{damaged.version:012d}-*")
    last.write_bytes(last.read_bytes()[:-9])
    after = publish(bundle, folder, 7)
    assert after.version == damaged.version + 1
    assert set(after.versions.tolist()) <= {*range(damaged.version), after.version}
    assert newer(str(folder), "", damaged.version).version == after.version


def test_two_learners_do_not_mix_their_clusters(bundle: ClusterSnapshot, folder: Path) -> None:
    first, second = (TenantLearners(bundle, str(folder), CONFIG) for _ in range(2))
    for learners in (first, second):
        learners.learn("", prompts(5))
    first.publish()
    published = first.publish()
    with pytest.raises(SetupError, match="another learner"):
        second.publish()
    second.learn("", prompts(6))
    assert second.publish().version == published.version + 1
    store = reader(str(folder))
    assert store is not None and store.latest_version() == published.version + 1


def test_only_what_is_newer_is_read(bundle: ClusterSnapshot, folder: Path) -> None:
    assert newer(str(folder), "", 0) is None
    published = publish(bundle, folder, 5)
    assert newer(str(folder), "", published.version) is None
    assert newer(str(folder), "other", 0) is None
    found = newer(str(folder), "", published.version - 1)
    assert found is not None and found.version == published.version
