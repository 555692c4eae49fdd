"""Episodes: many clusterings of the training contexts, so that thousands of conditions are seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster_router.index import spherical_kmeans
from cluster_router.wire.types import FloatArray
from training.clusters import IntArray, nearest
from training.config import HyperSettings


@dataclass(frozen=True, eq=False)
class Episode:
    """One clustering of a part of the training windows.

    Attributes:
        windows: int64 [n], the windows taken.
        rows: int64 [n], the cluster of each.
    """

    windows: IntArray
    rows: IntArray

    def members(self, row: int) -> IntArray:
        """The windows of one cluster."""
        return np.asarray(self.windows[self.rows == row])

    def clusters(self) -> list[IntArray]:
        """The windows of each cluster that has any."""
        return [self.members(row) for row in np.unique(self.rows).tolist()]


def draw_episodes(embeddings: FloatArray, settings: HyperSettings, seed: int) -> list[Episode]:
    """Cluster random subsets of `embeddings` [N, d] into random numbers of clusters."""
    random = np.random.default_rng(seed)
    return [_draw(embeddings, settings.clusters, random) for _ in range(settings.episodes)]


def _draw(
    embeddings: FloatArray, clusters: tuple[int, int], random: np.random.Generator
) -> Episode:
    total = len(embeddings)
    low, high = (min(bound, total) for bound in clusters)
    count = log_uniform(random, low, high)
    size = log_uniform(random, min(total, max(4 * count, total // 4)), total)
    windows = np.sort(random.choice(total, size, replace=False))
    centroids = spherical_kmeans(embeddings[windows], count, int(random.integers(2**31)), "cpu")
    _, rows = nearest(embeddings[windows], centroids)
    return Episode(windows, rows)


def log_uniform(random: np.random.Generator, low: int, high: int) -> int:
    """A whole number from `low` to `high`, its logarithm uniform."""
    return round(float(np.exp(random.uniform(np.log(low), np.log(high)))))
