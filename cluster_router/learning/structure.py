"""What more, or fewer, clusters would be worth, judged on the window of recent embeddings.

One currency throughout: the sum over the window of each embedding's cosine to its cluster's
centroid, which is what spherical k-means maximises. For the members of one cluster, summed to s,
the best centroid is s / |s| and the sum of cosines |s|. So splitting s into s1 + s2 gains
|s1| + |s2| - |s|, and merging two clusters loses the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster_router.wire.snapshot import unit
from cluster_router.wire.types import FloatArray

IntArray = NDArray[np.int64]
OUTSIDE = -1
"""Row of an embedding that resembles no cluster."""

_POWER_STEPS = 8
_LLOYD_STEPS = 6


@dataclass(frozen=True, eq=False)
class View:
    """The window under some centroids.

    Attributes:
        embeddings: float32 [n, d].
        similarities: float32 [n], to the nearest centroid.
        rows: int64 [n], row of that centroid, or OUTSIDE where it is under the threshold.
        counts: int64 [K], members of each cluster.
        sums: float32 [K, d], their sum.
    """

    embeddings: FloatArray
    similarities: FloatArray
    rows: IntArray
    counts: IntArray
    sums: FloatArray

    @classmethod
    def of(cls, embeddings: FloatArray, centroids: FloatArray, threshold: float) -> View:
        """Assign `embeddings` [n, d] to at least one centroid of `centroids` [K, d]."""
        similarities, rows = nearest(embeddings, centroids)
        rows = np.where(similarities >= threshold, rows, OUTSIDE)
        counts = np.bincount(rows[rows != OUTSIDE], minlength=len(centroids))
        sums = np.zeros_like(centroids)
        for row in np.flatnonzero(counts):
            sums[row] = embeddings[rows == row].sum(0)
        return cls(embeddings, similarities, rows, counts, sums)

    @property
    def dispersion(self) -> float:
        """Sum of the cosine distances to the nearest centroid."""
        return float((1 - self.similarities).sum())

    def members(self, row: int) -> FloatArray:
        """Embeddings [counts[row], d] of cluster `row`; of no cluster for OUTSIDE."""
        return self.embeddings[self.rows == row]


@dataclass(frozen=True, eq=False)
class Split:
    """A cluster in two: centroids float32 [2, d] and sizes of the halves, larger half first.

    `gain` is in the currency above.
    """

    row: int
    centroids: FloatArray
    sizes: tuple[int, int]
    gain: float


@dataclass(frozen=True)
class Merge:
    """Two clusters as one; `loss` mirrors the gain of a Split."""

    rows: tuple[int, int]
    loss: float


def nearest(embeddings: FloatArray, centroids: FloatArray) -> tuple[FloatArray, IntArray]:
    """Similarity float32 [N] and row int64 [N] of the nearest of at least one centroid.

    A plain matrix product: centroids change with every batch, so an index would not pay.
    """
    similarities = embeddings @ centroids.T
    rows = similarities.argmax(1)
    return similarities[np.arange(len(rows)), rows], rows


def bisect(members: FloatArray, row: int, min_size: int) -> Split | None:
    """The best split found of a cluster's `members` [n, d]; None if a half is under `min_size`.

    Starts from the sign along the leading principal direction, so no random numbers are needed.
    """
    total = members.sum(0)
    direction = _principal_direction(members - total / len(members))
    side = (members - total / len(members)) @ direction > 0
    for _ in range(_LLOYD_STEPS):
        count = int(side.sum())
        if min(count, len(side) - count) < min_size:
            return None
        first = members[side].sum(0)
        halves = unit(np.stack([first, total - first]))
        moved = members @ (halves[0] - halves[1]) > 0
        if (moved == side).all():
            break
        side = moved
    return _split(row, members, side, min_size)


def _split(row: int, members: FloatArray, side: NDArray[np.bool_], min_size: int) -> Split | None:
    count = int(side.sum())
    if 2 * count < len(side):
        side, count = ~side, len(side) - count
    if len(side) - count < min_size:
        return None
    total, first = members.sum(0), members[side].sum(0)
    sums = np.stack([first, total - first])
    gain = float(np.linalg.norm(sums, axis=1).sum() - np.linalg.norm(total))
    return Split(row, unit(sums), (count, len(side) - count), gain)


def _principal_direction(centred: FloatArray) -> FloatArray:
    direction = centred[np.argmax(np.einsum("nd,nd->n", centred, centred))]
    for _ in range(_POWER_STEPS):
        direction = unit(centred.T @ (centred @ direction))
    return direction


def cheapest_merge(view: View, min_size: int, keep: int | None = None) -> Merge | None:
    """The merge of two clusters that loses least.

    Clusters with fewer than `min_size` members in the window, and cluster `keep`, are left alone.
    """
    rows = np.flatnonzero((view.counts >= min_size) & (np.arange(len(view.counts)) != keep))
    if len(rows) < 2:
        return None
    gram = view.sums[rows] @ view.sums[rows].T
    squares = np.diag(gram)
    joint = np.sqrt(np.maximum(squares[:, None] + squares + 2 * gram, 0))
    loss = np.sqrt(squares)[:, None] + np.sqrt(squares) - joint
    loss[np.tri(len(rows), dtype=bool)] = np.inf
    a, b = np.unravel_index(int(loss.argmin()), loss.shape)
    return Merge((int(rows[a]), int(rows[b])), float(loss[a, b]))


def densest(outside: FloatArray, threshold: float, min_size: int) -> tuple[FloatArray, int] | None:
    """Centroid [d] and size of a new cluster among embeddings that resemble none; None if none.

    Its seed is the embedding whose `min_size` nearest neighbours are the nearest.
    """
    if len(outside) < min_size:
        return None
    similarities = outside @ outside.T
    closest = np.partition(similarities, -min_size, axis=1)[:, -min_size:]
    seed = int(closest.mean(1).argmax())
    group = np.argsort(-similarities[seed], kind="stable")[:min_size]
    for _ in range(_LLOYD_STEPS):
        centroid = unit(outside[group].sum(0))
        grown = np.flatnonzero(outside @ centroid >= threshold)
        if len(grown) < min_size:
            return None
        if np.array_equal(grown, group):
            break
        group = grown
    return centroid, len(grown)
