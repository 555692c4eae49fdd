import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cluster_router.clusters import Assigner
from cluster_router.index import FaissIndex
from cluster_router.refinements import Refinement
from cluster_router.wire.errors import BundleError, UnknownClusterError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import AdapterKey


@pytest.fixture
def snapshot(make_snapshot: Callable[..., ClusterSnapshot]) -> ClusterSnapshot:
    return make_snapshot(np.eye(3, 8), threshold=0.6)


@pytest.fixture
def assigner(snapshot: ClusterSnapshot) -> Assigner:
    return Assigner(snapshot, FaissIndex, "base", "hyper")


def toward(axis: int, cosine: float, dim: int = 8) -> np.ndarray:
    vector = np.zeros(dim, np.float32)
    vector[axis], vector[dim - 1] = cosine, np.sqrt(1 - cosine**2)
    return vector


def test_nearest_cluster_with_its_key_and_conditioning(
    assigner: Assigner, snapshot: ClusterSnapshot
) -> None:
    got = assigner.assign(toward(1, 0.9))
    assert got.cluster == 20
    assert got.key == AdapterKey("base", "hyper", cluster=20, version=2)
    assert got.similarity == pytest.approx(0.9, abs=1e-6)
    assert got.snapshot_version == 7
    assert np.array_equal(got.conditioning.vector, snapshot.conditioning[1])
    assert got.conditioning.support == 105


@pytest.mark.parametrize(("cosine", "cluster"), [(0.59, None), (0.61, 30)])
def test_threshold_decides_between_cluster_and_static(
    assigner: Assigner, cosine: float, cluster: int | None
) -> None:
    got = assigner.assign(toward(2, cosine))
    assert got.cluster == cluster
    assert got.similarity == pytest.approx(cosine, abs=1e-6)
    if cluster is None:
        assert got.key == AdapterKey("base", "hyper", cluster=None, version=0)
        assert got.conditioning is None


def test_off_compares_nothing(assigner: Assigner) -> None:
    got = assigner.assign(toward(0, 1.0), "off")
    assert (got.key, got.cluster, got.similarity, got.conditioning) == (None,) * 4


def test_a_cluster_can_be_forced(assigner: Assigner) -> None:
    got = assigner.assign(toward(0, 1.0), 30)
    assert (got.cluster, got.key.version, got.similarity) == (30, 3, None)
    assert got.conditioning is not None


def test_forcing_an_unknown_cluster_is_refused(assigner: Assigner) -> None:
    for call in (lambda: assigner.assign(toward(0, 1.0), 4), lambda: assigner.cluster(4)):
        with pytest.raises(UnknownClusterError, match="no cluster 4"):
            call()


def test_no_clusters_means_static(make_snapshot: Callable[..., ClusterSnapshot]) -> None:
    empty = make_snapshot(np.empty((0, 8)))
    got = Assigner(empty, FaissIndex, "base", "hyper").assign(toward(0, 1.0))
    assert (got.cluster, got.similarity) == (None, None)
    assert got.key == AdapterKey("base", "hyper", cluster=None, version=0)


def test_swap_changes_what_is_assigned_and_listed(
    assigner: Assigner, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    before = assigner.assign(toward(0, 1.0))
    assigner.swap(make_snapshot(np.eye(3, 8)[::-1], version=8, first_id=110))
    after = assigner.assign(toward(0, 1.0))
    assert (before.cluster, before.snapshot_version) == (10, 7)
    assert (after.cluster, after.snapshot_version) == (130, 8)
    assert [info.id for info in assigner.table()[1]] == [110, 120, 130]


def test_a_cluster_that_stayed_keeps_its_key(
    assigner: Assigner, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    before = assigner.assign(toward(0, 1.0)).key
    assigner.swap(make_snapshot(np.eye(3, 8), version=9))
    assert assigner.assign(toward(0, 1.0)).key == before


def test_swap_refuses_another_embedding_size(
    assigner: Assigner, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    with pytest.raises(BundleError, match="size 4"):
        assigner.swap(make_snapshot(np.eye(3, 4), version=8))
    assert assigner.snapshot.version == 7


def test_assignments_during_swaps_are_never_mixed(
    assigner: Assigner, make_snapshot: Callable[..., ClusterSnapshot]
) -> None:
    """Snapshots with odd versions name the clusters in the opposite order of even ones."""
    even = make_snapshot(np.eye(3, 8), version=2)
    odd = make_snapshot(np.eye(3, 8)[::-1], version=3)
    assigner.swap(even)
    stop = threading.Event()

    def swap_forever() -> None:
        while not stop.is_set():
            assigner.swap(odd)
            assigner.swap(even)

    thread = threading.Thread(target=swap_forever)
    thread.start()
    seen, asked, deadline = set(), 0, time.monotonic() + 60
    try:
        while asked < 2000 or (len(seen) < 2 and time.monotonic() < deadline):
            got = assigner.assign(toward(0, 1.0))
            seen.add((got.snapshot_version, got.cluster))
            asked += 1
    finally:
        stop.set()
        thread.join()
    assert seen == {(2, 10), (3, 30)}


def test_small_clusters_are_not_described(
    make_snapshot: Callable[..., ClusterSnapshot],
) -> None:
    def describe(directions: np.ndarray) -> list[tuple[str, ...]]:
        return [("word",)] * len(directions)

    sizes = np.array([19, 20, 21])
    snapshot = replace(make_snapshot(np.eye(3, 8)), sizes=sizes)
    assigner = Assigner(snapshot, FaissIndex, "base", "hyper", describe, described_from=20)
    shown = [info.characteristic_tokens for info in assigner.table()[1]]
    assert shown == [(), ("word",), ("word",)]
    assert assigner.cluster(10).characteristic_tokens == ()


def test_info_names_clusters_by_the_direction_from_the_mean(
    make_snapshot: Callable[..., ClusterSnapshot],
) -> None:
    seen = []

    def describe(directions: np.ndarray) -> list[tuple[str, ...]]:
        seen.append(directions)
        return [(str(int(np.argmax(row))),) for row in directions]

    snapshot = replace(make_snapshot(np.eye(3, 8)), mean=np.full(8, 0.25, np.float32))
    assigner = Assigner(snapshot, FaissIndex, "base", "hyper", describe)
    one = assigner.cluster(20)
    assert (one.id, one.size, one.version) == (20, 105, 2)
    assert one.adapter_key == AdapterKey("base", "hyper", 20, 2).id
    assert [info.characteristic_tokens for info in assigner.table()[1]] == [("0",), ("1",), ("2",)]
    assert assigner.table()[1][1] == one
    # Each direction is described once a snapshot, and only when it is shown.
    expected = np.eye(3, 8) - 0.25
    assert np.array_equal(np.concatenate(seen), expected[[1, 0, 2]])


def test_a_router_that_has_seen_earlier_snapshots_describes_as_one_that_begins(
    make_snapshot: Callable[..., ClusterSnapshot],
) -> None:
    def describe(directions: np.ndarray) -> list[tuple[str, ...]]:
        return [(f"{row.sum():.3f}",) for row in directions]

    first = make_snapshot(np.eye(3, 8))
    # The clusters are where they were, the mean of all traffic is not.
    second = replace(first, version=8, mean=first.mean + 0.25)
    old = Assigner(first, FaissIndex, "base", "hyper", describe)
    before = old.table()[1]
    old.swap(second)
    snapshot, after = old.table()
    assert snapshot.version == 8
    assert after == Assigner(second, FaissIndex, "base", "hyper", describe).table()[1]
    assert after[0].characteristic_tokens != before[0].characteristic_tokens


def test_a_refined_cluster_has_the_key_of_its_refinement(
    make_snapshot: Callable[..., ClusterSnapshot],
) -> None:
    refined: dict[int, Refinement] = {}
    assigner = Assigner(make_snapshot(np.eye(4)), FaissIndex, "base", "hyper", refined=refined.get)
    before = assigner.assign(np.eye(4, dtype=np.float32)[1])
    refined[20] = Refinement(3, "cafe")
    after = assigner.assign(np.eye(4, dtype=np.float32)[1])
    assert before.key == AdapterKey("base", "hyper", 20, 2)
    assert after.key == AdapterKey("base", "hyper", 20, 0, refinement="cafe")
    assert before.key is not None and after.key is not None
    assert before.key.id != after.key.id
    shown = assigner.cluster(20)
    assert (shown.version, shown.refinement, shown.adapter_key) == (2, 3, after.key.id)
    assert assigner.cluster(10).refinement == 0
