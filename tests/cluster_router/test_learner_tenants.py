"""Namespaces share nothing but the bundle they began with."""

from pathlib import Path

import numpy as np
import pytest

from cluster_router.learning.config import LearnerConfig
from cluster_router.learning.tenants import TenantLearners, reader
from cluster_router.wire.errors import OverloadedError, SetupError
from cluster_router.wire.snapshot import ClusterSnapshot

DIM = 24
CONFIG = LearnerConfig(window=256, interval=64, split_gain=0.05, centre_after=128)


def prompts(number: int, count: int = 128) -> np.ndarray:
    noise = np.random.default_rng(number).normal(size=(count, DIM)) * 0.04
    return (np.eye(DIM)[number] + noise).astype(np.float32)


@pytest.fixture
def bundle() -> ClusterSnapshot:
    centroids = np.eye(DIM, dtype=np.float32)[:2]
    sizes = np.full(2, 50)
    ids = np.array([0, 1])
    return ClusterSnapshot(
        1, ids, centroids, sizes, np.ones(2, int), centroids, centroids.mean(0), 0.7
    )


@pytest.fixture
def learners(bundle: ClusterSnapshot, tmp_path: Path) -> TenantLearners:
    return TenantLearners(bundle, str(tmp_path), CONFIG)


def same(first: ClusterSnapshot, second: ClusterSnapshot) -> bool:
    return all(np.array_equal(v, second.arrays()[n]) for n, v in first.arrays().items())


def test_one_tenants_prompts_change_nothing_for_another(
    learners: TenantLearners, bundle: ClusterSnapshot, tmp_path: Path
) -> None:
    alone = TenantLearners(bundle, str(tmp_path / "alone"), CONFIG)
    for number in (0, 5, 1):
        alone.learn("a", prompts(number))
        learners.learn("a", prompts(number))
        learners.learn("b", prompts(number + 7))
        learners.learn("", prompts(number + 9))
    mine = learners.publish("a")
    assert same(mine, alone.publish("a"))
    assert len(mine) > len(bundle)
    theirs = [learners.publish(name) for name in ("b", "")]
    assert all((mine.centroids @ other.centroids[2:].T).max() < 0.6 for other in theirs)


def test_no_cluster_id_means_something_in_two_namespaces(learners: TenantLearners) -> None:
    names = ["", "a", "b"]
    for name in names:
        for number in (0, 5):
            learners.learn(name, prompts(number))
    ids = [set(learners.publish(name).ids.tolist()) for name in names]
    assert {0, 1} < ids[0]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])


def test_every_namespace_survives_a_restart(
    learners: TenantLearners, bundle: ClusterSnapshot, tmp_path: Path
) -> None:
    for name, number in (("a", 4), ("b", 6)):
        learners.learn(name, prompts(number))
    published = {name: learners.publish(name) for name in ("a", "b")}
    restarted = TenantLearners(bundle, str(tmp_path), CONFIG)
    restarted.learn("c", prompts(3))  # a newcomer, before the others are heard of again
    for name, before in published.items():
        assert same(restarted.publish(name), before)
        store = reader(str(tmp_path), name)
        assert store is not None
        assert store.latest_version() == before.version
    newcomer = set(restarted.publish("c").ids.tolist())
    assert all(not newcomer & set(before.ids.tolist()) for before in published.values())


def test_nothing_is_published_that_is_not_saved(bundle: ClusterSnapshot, tmp_path: Path) -> None:
    learners = TenantLearners(bundle, str(tmp_path / "state"), CONFIG)
    learners.learn("", prompts(5))
    (tmp_path / "state").write_text("in the way")
    with pytest.raises(SetupError):
        learners.publish()
    assert learners.namespaces() == [""]
    (tmp_path / "state").unlink()
    snapshot = learners.publish()
    store = reader(str(tmp_path / "state"))
    assert store is not None
    assert store.latest_version() == snapshot.version


def test_before_a_namespace_has_learned_there_is_nothing_to_read(
    learners: TenantLearners, tmp_path: Path
) -> None:
    assert reader(str(tmp_path), "a") is None
    learners.learn("a", prompts(0))
    learners.publish("a")
    assert reader(str(tmp_path), "a") is not None
    assert reader(str(tmp_path), "b") is None


def test_names_cannot_lead_out_of_the_folder(bundle: ClusterSnapshot, tmp_path: Path) -> None:
    learners = TenantLearners(bundle, str(tmp_path / "state"), CONFIG)
    for name in ("../../escape", "/etc", "a/b", "\x00"):
        learners.learn(name, prompts(0))
        learners.publish(name)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert len(list((tmp_path / "state").iterdir())) == 4


def test_the_number_of_namespaces_is_bounded(bundle: ClusterSnapshot, tmp_path: Path) -> None:
    learners = TenantLearners(bundle, str(tmp_path), CONFIG, max_namespaces=2)
    learners.learn("a", prompts(0))
    learners.learn("b", prompts(0))
    with pytest.raises(OverloadedError, match="max_namespaces"):
        learners.learn("c", prompts(0))
    learners.learn("a", prompts(1))
