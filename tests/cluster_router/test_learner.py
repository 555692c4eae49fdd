"""The learner on synthetic topics: unit vectors scattered around well-separated directions."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster_router.learner import CentroidLearner
from cluster_router.learning.config import LearnerConfig
from cluster_router.wire.errors import BundleError, RequestError
from cluster_router.wire.snapshot import ClusterSnapshot

DIM = 32
CONFIG = LearnerConfig(
    window=512,
    interval=64,
    memory=100,
    idle=1500,
    split_gain=0.05,
    growth=4,
    centre_after=None,
    threshold_percentile=1,
)


def topic(number: int, count: int, seed: int = 0, spread: float = 0.05) -> np.ndarray:
    """`count` unit vectors around the axis `number`."""
    noise = np.random.default_rng([seed, number]).normal(size=(count, DIM)) * spread
    return unit(np.eye(DIM)[number] + noise)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def mixed(numbers: Sequence[int], count: int, seed: int = 0) -> np.ndarray:
    """`count` prompts of several topics, in random order."""
    rows = np.concatenate([topic(number, count // len(numbers), seed) for number in numbers])
    return np.random.default_rng(seed).permutation(rows)


def fresh(config: LearnerConfig = CONFIG) -> CentroidLearner:
    return CentroidLearner(ClusterSnapshot.empty(DIM), config)


def cluster_of(snapshot: ClusterSnapshot, number: int) -> int | None:
    """Id of the cluster around axis `number`."""
    close = np.flatnonzero(snapshot.centroids[:, number] > 0.95)
    return int(snapshot.ids[close[0]]) if len(close) else None


@pytest.fixture
def bundle() -> ClusterSnapshot:
    """Topics 0, 1 and 2 as clusters 10, 20 and 30, of 50 prompts each."""
    centroids = np.eye(DIM, dtype=np.float32)[:3]
    return ClusterSnapshot(
        version=1,
        ids=np.array([10, 20, 30]),
        centroids=centroids,
        sizes=np.full(3, 50),
        versions=np.ones(3, np.int64),
        conditioning=centroids.copy(),
        mean=centroids.mean(0),
        threshold=0.7,
    )


def test_starts_as_the_bundle_and_learns_nothing_from_nothing(bundle: ClusterSnapshot) -> None:
    learner = CentroidLearner(bundle, CONFIG)
    assert learner.learn(np.zeros((0, DIM), np.float32)) is None
    learner.learn(np.zeros((5, DIM), np.float32))  # prompts whose tokens cancel out
    assert learner.snapshot() is bundle


def test_finds_the_topics_of_an_unknown_stream() -> None:
    learner = fresh()
    learner.learn(mixed(range(6), 1200))
    snapshot = learner.snapshot()
    assert len(snapshot) == 6
    assert {cluster_of(snapshot, number) for number in range(6)} == set(snapshot.ids.tolist())
    assert snapshot.threshold > 0.5


def test_a_novel_topic_is_spawned_and_no_other_cluster_moves(bundle: ClusterSnapshot) -> None:
    learner = CentroidLearner(bundle, CONFIG)
    learner.learn(mixed([0, 1, 2], 600))
    before = learner.snapshot()
    learner.learn(np.concatenate([mixed([0, 1, 2], 300, seed=1), topic(5, 100)]))
    after = learner.snapshot()
    assert cluster_of(before, 5) is None
    assert cluster_of(after, 5) == 31
    assert after.versions[after.row(31)] == after.version
    assert after.versions[:3].tolist() == before.versions.tolist()


def test_a_cluster_of_two_topics_is_split(bundle: ClusterSnapshot) -> None:
    near = unit(np.eye(DIM)[0] + 0.6 * np.eye(DIM)[9])  # close enough to be taken for topic 0
    rows = unit(near + np.random.default_rng(0).normal(size=(300, DIM)) * 0.03)
    assert rows[:, 0].min() > bundle.threshold
    learner = CentroidLearner(bundle, CONFIG)
    learner.learn(np.random.default_rng(1).permutation(np.concatenate([topic(0, 300), rows])))
    snapshot = learner.snapshot()
    similarity = snapshot.centroids @ near
    assert similarity.max() > 0.98
    assert cluster_of(snapshot, 0) not in (None, snapshot.ids[similarity.argmax()])


def test_twin_clusters_are_merged_under_one_of_their_ids() -> None:
    twins = unit(np.eye(DIM)[0] + 0.02 * np.eye(DIM)[[1, 2]])
    start = ClusterSnapshot(
        3, np.array([4, 7]), twins, np.array([60, 50]), np.array([3, 2]), twins, twins[0], 0.5
    )
    learner = CentroidLearner(start, CONFIG.model_copy(update={"merge_loss": 0.04}))
    learner.learn(topic(0, 256))
    snapshot = learner.snapshot()
    assert len(snapshot) == 1
    assert snapshot.ids[0] in (4, 7)


def test_idle_clusters_retire_and_their_ids_stay_retired(bundle: ClusterSnapshot) -> None:
    learner = CentroidLearner(bundle, CONFIG)
    learner.learn(np.concatenate([topic(5, 100), mixed([0, 1], 2000)]))
    snapshot = learner.snapshot()
    assert cluster_of(snapshot, 2) is None
    assert cluster_of(snapshot, 5) is None
    learner.learn(np.concatenate([mixed([0, 1], 200, seed=3), topic(5, 200, seed=4)]))
    returned = cluster_of(learner.snapshot(), 5)
    assert returned is not None
    assert returned > 31


def test_the_past_is_forgotten(bundle: ClusterSnapshot) -> None:
    turned = unit(np.eye(DIM)[0] + 0.5 * np.eye(DIM)[8])
    learner = CentroidLearner(bundle, CONFIG.model_copy(update={"split_gain": 0.9}))
    learner.learn(topic(0, 2000))
    rows = unit(turned + np.random.default_rng(0).normal(size=(800, DIM)) * 0.03)
    learner.learn(rows)
    snapshot = learner.snapshot()
    row = snapshot.row(10)
    assert row is not None
    # 2,000 prompts came from the old direction and 800 from the new: a plain mean would lag.
    assert snapshot.centroids[row] @ turned > 0.998


def test_a_version_moves_with_the_centroid_and_not_before(bundle: ClusterSnapshot) -> None:
    learner = CentroidLearner(bundle, CONFIG.model_copy(update={"settled": 0, "split_gain": 0.9}))
    learner.learn(mixed([0, 1, 2], 600))
    still = learner.snapshot()
    assert still.version == 2
    assert still.versions.tolist() == [1, 1, 1]
    assert not np.array_equal(still.centroids, bundle.centroids)
    assert np.array_equal(still.conditioning, bundle.conditioning)
    assert np.array_equal(still.sizes, bundle.sizes)
    learner.learn(unit(topic(0, 400) + 0.25 * np.eye(DIM, dtype=np.float32)[8]))
    moved = learner.snapshot()
    row = moved.row(10)
    assert moved.versions[row] == moved.version == 3
    assert np.array_equal(moved.conditioning[row], moved.centroids[row])
    assert moved.versions[moved.row(20)] == 1


def test_growing_support_moves_the_version_until_it_has_settled(bundle: ClusterSnapshot) -> None:
    changes = {"growth": 4.0, "settled": 100, "drift": 100.0, "split_gain": 0.9}
    config = CONFIG.model_copy(update=changes)
    learner = CentroidLearner(bundle, config)
    versions, sizes = [], []
    for seed in range(6):
        learner.learn(topic(0, 64, seed))
        snapshot = learner.snapshot()
        row = snapshot.row(10)
        assert row is not None
        versions.append(int(snapshot.versions[row]))
        sizes.append(int(snapshot.sizes[row]))
    assert versions == [1, 1, 4, 4, 4, 4]  # 50 + 3 * 64 is the first to reach 200
    assert sizes == [50, 50, 242, 242, 242, 242]


def test_at_the_limit_newcomers_take_the_place_of_the_least_useful() -> None:
    learner = fresh(CONFIG.model_copy(update={"max_clusters": 4}))
    learner.learn(mixed(range(4), 800))
    assert len(learner.snapshot()) == 4
    learner.learn(mixed([1, 2, 3, 7], 1200, seed=2))
    snapshot = learner.snapshot()
    assert len(snapshot) == 4
    assert cluster_of(snapshot, 7) is not None
    assert cluster_of(snapshot, 0) is None


def test_a_start_above_the_limit_shrinks_to_it() -> None:
    """A bundle of many clusters, or a limit that was lowered."""
    centroids = np.eye(DIM, dtype=np.float32)[:12]
    sizes, versions = np.full(12, 50), np.ones(12, np.int64)
    start = ClusterSnapshot(
        1, np.arange(12), centroids, sizes, versions, centroids, centroids.mean(0), 0.5
    )
    changes = {"max_clusters": 8, "split_gain": 0.001, "merge_loss": 0.0003}
    learner = CentroidLearner(start, CONFIG.model_copy(update=changes))
    rng = np.random.default_rng(0)
    shift = 0.4 * np.eye(DIM, dtype=np.float32)[12 + np.arange(12)]
    counts = []
    for seed in range(24):  # each of the twelve topics is worth a split
        rows = mixed(range(12), 96, seed)
        counts.append(len(learner))
        learner.learn(unit(rows + rng.choice([-1, 1], (96, 1)) * shift[rows[:, :12].argmax(1)]))
    assert counts[4] == 12, "before a full window has shown which are of use, all stay"
    assert counts == sorted(counts, reverse=True)
    assert len(learner) == 8


@pytest.mark.parametrize("centre_after", [None, 256])
def test_prompts_that_are_all_alike_belong_and_move_no_version(
    bundle: ClusterSnapshot, centre_after: int | None
) -> None:
    """As under a long fixed system prompt, of which only the first tokens count."""
    rng = np.random.default_rng(0)
    alike = unit(np.eye(DIM)[[0, 1, 2]] + rng.normal(size=(3, DIM)) * 0.1)
    learner = CentroidLearner(bundle, CONFIG.model_copy(update={"centre_after": centre_after}))
    snapshots = []
    for _ in range(40):
        noise = rng.normal(size=(64, DIM)) * 1e-6  # more than rounding, less than a word
        rows = unit(alike[rng.integers(0, 3, 64)] + noise)
        learner.learn(rows)
        snapshots.append(learner.snapshot())
        snapshot = snapshots[-1]
        nearest = (snapshot.project(rows) @ snapshot.centroids.T).max(1)
        if len(snapshots) > 20:
            assert (nearest >= snapshot.threshold).all()
    assert snapshots[-1].threshold <= 1 - 1e-3
    assert learner.state()["spread"][0] >= 1e-3, "drift is a share of it"
    assert snapshots[-1].versions.tolist() == snapshots[20].versions.tolist()


def test_outsiders_move_no_centroid(bundle: ClusterSnapshot) -> None:
    learner = CentroidLearner(bundle, CONFIG)
    learner.learn(topic(6, 4))
    assert np.array_equal(learner.snapshot().centroids, bundle.centroids)


def test_what_is_published_never_changes(bundle: ClusterSnapshot) -> None:
    learner = CentroidLearner(bundle, CONFIG)
    learner.learn(mixed([0, 1, 2], 300))
    snapshot = learner.snapshot()
    copies = {name: values.copy() for name, values in snapshot.arrays().items()}
    learner.learn(mixed([0, 4, 5], 600))
    learner.snapshot()
    assert all(np.array_equal(copies[n], v) for n, v in snapshot.arrays().items())
    with pytest.raises(ValueError, match="read-only"):
        snapshot.centroids[0] = 0


def test_goes_on_where_another_learner_stopped(bundle: ClusterSnapshot) -> None:
    learner = CentroidLearner(bundle, CONFIG)
    learner.learn(np.concatenate([topic(5, 200), mixed([0, 1], 1800)]))
    stopped = learner.snapshot()
    assert cluster_of(stopped, 5) is None  # cluster 31, retired
    resumed = CentroidLearner(stopped, CONFIG, learner.state())
    assert resumed.snapshot() is stopped
    resumed.learn(np.concatenate([mixed([0, 1], 100), topic(5, 200, seed=7)]))
    snapshot = resumed.snapshot()
    assert snapshot.version == stopped.version + 1
    assert cluster_of(snapshot, 5) is not None
    assert 31 not in snapshot.ids


def test_foreign_state_is_refused(bundle: ClusterSnapshot) -> None:
    state = dict(CentroidLearner(bundle, CONFIG).state())
    with pytest.raises(BundleError, match="weights does not fit"):
        CentroidLearner(bundle, CONFIG, state | {"weights": np.ones(2, np.float32)})
    del state["clock"]
    with pytest.raises(BundleError, match="clock is missing"):
        CentroidLearner(bundle, CONFIG, state)


@pytest.mark.parametrize(
    "rows", [np.zeros(DIM), np.zeros((2, DIM + 1)), np.full((1, DIM), np.nan), [[np.inf] * DIM]]
)
def test_bad_embeddings_are_refused_whole(bundle: ClusterSnapshot, rows: np.ndarray) -> None:
    learner = CentroidLearner(bundle, CONFIG)
    with pytest.raises(RequestError):
        learner.learn(rows)
    assert learner.snapshot() is bundle


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    topics=st.lists(st.integers(0, DIM - 1), min_size=1, max_size=8),
    cuts=st.lists(st.integers(1, 399), max_size=5, unique=True),
    limit=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_invariants_hold_on_any_stream(
    topics: list[int], cuts: list[int], limit: int, seed: int
) -> None:
    config = CONFIG.model_copy(update={"max_clusters": limit, "idle": 150})
    rows = np.concatenate([topic(number, 400 // len(topics), seed) for number in topics])
    whole, parts = fresh(config), fresh(config)
    whole.learn(rows)
    for part in np.split(rows, sorted(cut for cut in cuts if cut < len(rows))):
        parts.learn(part)
    first, second = whole.snapshot(), parts.snapshot()
    assert all(np.array_equal(v, second.arrays()[n]) for n, v in first.arrays().items())
    for learner in (whole, parts):
        learner.learn(topic(30, 70, seed))
    later = whole.snapshot()
    assert len(later) <= limit
    assert later.version == first.version + 1
    assert np.allclose(np.linalg.norm(later.centroids, axis=1), 1, atol=1e-5)
    assert len(set(later.ids.tolist())) == len(later)
    assert (later.versions >= 1).all()
    assert (later.versions <= later.version).all()
    for row, cluster in enumerate(first.ids.tolist()):
        if (now := later.row(cluster)) is not None:
            same = later.versions[now] == first.versions[row]
            assert same or later.versions[now] == later.version
            # An adapter key covers the conditioning and the support.
            if same:
                assert np.array_equal(later.conditioning[now], first.conditioning[row])
                assert later.sizes[now] == first.sizes[row]
    newcomers = set(later.ids.tolist()) - set(first.ids.tolist())
    assert all(cluster > first.ids.max(initial=-1) for cluster in newcomers)


def test_unknown_and_contradicting_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        LearnerConfig(half_life=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="merge_loss"):
        LearnerConfig(split_gain=0.001, merge_loss=0.002)
    with pytest.raises(ValidationError, match="window"):
        LearnerConfig(window=10, min_size=8)
