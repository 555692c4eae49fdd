from __future__ import annotations

import numpy as np
import pytest

from cluster_router.console.layout import ClusterMap
from cluster_router.wire.types import FloatArray


def unit(rows: FloatArray) -> FloatArray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def centroids(count: int, seed: int = 0) -> FloatArray:
    """Three families around directions of their own."""
    rng = np.random.default_rng(seed)
    families = rng.normal(size=(3, 32))
    return unit(families[np.arange(count) % 3] + 0.3 * rng.normal(size=(count, 32)))


def test_alike_is_near() -> None:
    rows = centroids(12)
    points = ClusterMap(rows, rows.mean(0)).place(rows)
    near = np.linalg.norm(points[:, None] - points[None], axis=2)
    family = np.arange(12) % 3
    same = (family[:, None] == family) & ~np.eye(12, dtype=bool)
    assert near[same].max() < near[family[:, None] != family].min()
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=0.1)


def test_a_map_is_the_same_each_time() -> None:
    rows = centroids(12)
    first, second = (ClusterMap(rows, rows.mean(0)).place(rows) for _ in range(2))
    assert np.array_equal(first, second)


def test_a_cluster_stays_where_it_is_whatever_others_do() -> None:
    rows = centroids(12)
    plane = ClusterMap(rows, rows.mean(0))
    before = plane.place(rows)
    moved = unit(np.concatenate([rows[:1] + 0.03, rows[1:], centroids(5, seed=9)]))
    after = plane.place(moved)
    assert np.abs(after[1:12] - before[1:]).max() < 1e-5  # unit length is float32
    assert 0 < np.linalg.norm(after[0] - before[0]) < 0.3


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_of_few_landmarks(count: int) -> None:
    rows = centroids(count)
    points = ClusterMap(rows, np.zeros(32, np.float32)).place(centroids(4))
    assert points.shape == (4, 2) and np.isfinite(points).all()


def test_a_centroid_at_the_mean_is_somewhere() -> None:
    rows = centroids(6)
    assert np.isfinite(ClusterMap(rows, rows[0]).place(rows)).all()


def test_of_very_many_centroids_some_are_landmarks() -> None:
    rows = centroids(20_000)
    plane = ClusterMap(rows, rows.mean(0))
    points = plane.place(rows[:300])
    family = np.arange(300) % 3
    centres = np.stack([points[family == one].mean(0) for one in range(3)])
    nearest = np.linalg.norm(points[:, None] - centres[None], axis=2).argmin(1)
    assert np.array_equal(nearest, family)
