"""Topics that differ little beside what all prompts share: told apart from the mean of traffic."""

from __future__ import annotations

import numpy as np
import pytest

from cluster_router.clusters import Assigner
from cluster_router.index import FaissIndex
from cluster_router.learner import CentroidLearner
from cluster_router.learning.config import LearnerConfig
from cluster_router.wire.errors import BundleError
from cluster_router.wire.snapshot import ClusterSnapshot, unit

DIM = 48
CONFIG = LearnerConfig(window=1024, interval=128, centre_after=256, split_gain=0.05)
SHARED = np.eye(DIM, dtype=np.float32)[DIM - 1] * 3  # the direction that all prompts have in common


def prompts(numbers: list[int], count: int, seed: int = 0) -> np.ndarray:
    """`count` prompts of several topics in random order: axes, on top of the shared direction."""
    random = np.random.default_rng([seed, *numbers])
    topics = random.choice(numbers, count)
    noise = random.normal(size=(count, DIM)) * 0.06
    return unit(SHARED + np.eye(DIM)[topics] + noise)


def topics_of(rows: np.ndarray) -> np.ndarray:
    return rows[:, : DIM - 1].argmax(1)


@pytest.fixture
def bundle() -> ClusterSnapshot:
    """Topics 0 to 3, as seen from the origin."""
    centroids = unit(SHARED + np.eye(DIM)[:4])
    sizes, ids = np.full(4, 60), np.arange(4)
    return ClusterSnapshot(
        1, ids, centroids, sizes, np.ones(4, int), centroids, centroids.mean(0), 0.9
    )


@pytest.fixture
def learner(bundle: ClusterSnapshot) -> CentroidLearner:
    return CentroidLearner(bundle, CONFIG)


def test_the_centre_moves_once_there_is_traffic_to_judge_by(learner: CentroidLearner) -> None:
    learner.learn(prompts([0, 1, 2, 3], 192))
    assert learner.snapshot().centre is None
    learner.learn(prompts([0, 1, 2, 3], 192, seed=1))
    centre = learner.snapshot().centre
    assert centre is not None
    assert unit(centre) @ unit(SHARED) > 0.95
    learner.learn(prompts([5], 512))
    assert learner.snapshot().centre is centre


def test_clusters_keep_ids_and_updates_when_the_centre_moves(
    learner: CentroidLearner, bundle: ClusterSnapshot
) -> None:
    learner.learn(prompts([0, 1, 2, 3], 384))
    snapshot = learner.snapshot()
    assert snapshot.ids.tolist() == bundle.ids.tolist()
    assert snapshot.versions.tolist() == bundle.versions.tolist()
    assert np.array_equal(snapshot.conditioning, bundle.conditioning)
    rows = prompts([0, 1, 2, 3], 200, seed=9)
    nearest = (snapshot.project(rows) @ snapshot.centroids.T).argmax(1)
    assert (snapshot.ids[nearest] == topics_of(rows)).mean() > 0.97


def test_a_novel_topic_stands_out_and_its_update_is_made_of_its_mean_prompt(
    learner: CentroidLearner,
) -> None:
    learner.learn(prompts([0, 1, 2, 3], 512))
    learner.learn(prompts([0, 1, 2, 3, 7], 640, seed=2))
    snapshot = learner.snapshot()
    novel = prompts([7], 200, seed=3)
    own = np.bincount((snapshot.project(novel) @ snapshot.centroids.T).argmax(1)).argmax()
    assert snapshot.ids[own] >= 4
    assert snapshot.conditioning[own] @ unit(novel.mean(0)) > 0.995


def test_requests_are_assigned_from_the_centre(learner: CentroidLearner) -> None:
    learner.learn(prompts([0, 1, 2, 3], 512))
    snapshot = learner.snapshot()
    seen: list[np.ndarray] = []

    def describe(directions: np.ndarray) -> list[tuple[str, ...]]:
        seen.extend(directions)
        return [()] * len(directions)

    assigner = Assigner(snapshot, FaissIndex, "base", "hyper", describe)
    [prompt] = prompts([2], 1, seed=4)
    got = assigner.assign(prompt)
    row = snapshot.row(2)
    assert got.cluster == 2
    assert got.similarity == pytest.approx(
        float(snapshot.project(prompt) @ snapshot.centroids[row]), abs=1e-5
    )
    assert got.similarity > snapshot.threshold
    # One with nothing but what all prompts share resembles no cluster.
    assert assigner.assign(unit(SHARED - np.eye(DIM)[30])).cluster is None
    assigner.cluster(2)
    assert int(np.argmax(seen[0])) == 2


def test_goes_on_after_a_restart(learner: CentroidLearner, bundle: ClusterSnapshot) -> None:
    learner.learn(prompts([0, 1, 2, 3], 512))
    snapshot = learner.snapshot()
    arrays, state = snapshot.arrays(), learner.state()
    restarted = CentroidLearner(ClusterSnapshot.from_arrays(arrays), CONFIG, state)
    more = prompts([0, 1, 2, 3], 64, seed=5)
    for one in (learner, restarted):
        one.learn(more)
    expected, got = learner.snapshot().arrays(), restarted.snapshot().arrays()
    for name in ("ids", "centroids", "versions", "conditioning", "centre", "threshold"):
        assert np.allclose(expected[name], got[name], atol=1e-6), name
    with pytest.raises(BundleError, match="reach is missing"):
        CentroidLearner(snapshot, CONFIG, {k: v for k, v in state.items() if k != "reach"})


def test_a_centre_of_the_wrong_size_or_not_finite_is_refused(bundle: ClusterSnapshot) -> None:
    arrays = bundle.arrays()
    for centre in (np.zeros(3, np.float32), np.full(DIM, np.nan, np.float32)):
        with pytest.raises(BundleError, match="centre"):
            ClusterSnapshot.from_arrays(arrays | {"centre": centre})
