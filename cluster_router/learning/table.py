"""The clusters while they are learned: one row each, in arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from cluster_router.wire.snapshot import ClusterSnapshot, unit
from cluster_router.wire.types import FloatArray

IntArray = NDArray[np.int64]
UNPUBLISHED = 0
"""Version of a cluster that no snapshot has shown yet."""


@dataclass(eq=False)
class ClusterTable:
    """K clusters. The learner alone changes it.

    Attributes:
        ids: int64 [K].
        centroids: float32 [K, d], unit length.
        weights: float32 [K], prompts each centroid stands for; capped, so that it can move on.
        counts: int64 [K], prompts seen.
        seen: int64 [K], when the last of them came, in prompts learned.
        versions: int64 [K], snapshot version of the published update, or UNPUBLISHED.
        anchors: float32 [K, d], centroid at that version.
        support: int64 [K], `counts` at that version.
        conditioning: float32 [K, c], what the hypernetwork is given for that version.
        reach: float32 [K], how far along its centroid a cluster's mean prompt is from the centre;
            zero where it is not known, and where there is no centre.
        next_id: id of the next new cluster. It only grows, so no id comes back.
    """

    ids: IntArray
    centroids: FloatArray
    weights: FloatArray
    counts: IntArray
    seen: IntArray
    versions: IntArray
    anchors: FloatArray
    support: IntArray
    conditioning: FloatArray
    reach: FloatArray
    next_id: int

    @classmethod
    def of(cls, snapshot: ClusterSnapshot, memory: int, first_id: int) -> ClusterTable:
        """The clusters of a snapshot; each centroid weighs at most `memory` prompts.

        Clusters not in it get ids from `first_id`, or from the largest of its ids if that is more.
        """
        return cls(
            ids=snapshot.ids.copy(),
            centroids=unit(snapshot.centroids),
            weights=np.minimum(snapshot.sizes, memory).astype(np.float32),
            counts=snapshot.sizes.copy(),
            seen=np.zeros(len(snapshot), np.int64),
            versions=snapshot.versions.copy(),
            anchors=unit(snapshot.centroids),
            support=snapshot.sizes.copy(),
            conditioning=snapshot.conditioning.copy(),
            reach=np.zeros(len(snapshot), np.float32),
            next_id=max(first_id, int(snapshot.ids.max(initial=-1)) + 1),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, mask: NDArray[np.bool_]) -> None:
        """Drop the rows where `mask` [K] is false."""
        for field in fields(self):
            values = getattr(self, field.name)
            if isinstance(values, np.ndarray):
                setattr(self, field.name, values[mask])

    def append(self, centroid: FloatArray, weight: int, now: int) -> None:
        """Add an unpublished cluster of `weight` prompts around `centroid` [d], last seen `now`."""
        self.ids = np.append(self.ids, np.int64(self.next_id))
        self.centroids = np.vstack([self.centroids, centroid])
        self.weights = np.append(self.weights, np.float32(weight))
        self.counts = np.append(self.counts, np.int64(weight))
        self.seen = np.append(self.seen, np.int64(now))
        self.versions = np.append(self.versions, np.int64(UNPUBLISHED))
        self.anchors = np.vstack([self.anchors, centroid])
        self.support = np.append(self.support, np.int64(weight))
        self.conditioning = np.vstack([self.conditioning, centroid])
        self.reach = np.append(self.reach, np.float32(0))
        self.next_id += 1

    def fold(self, row: int, into: int) -> None:
        """Merge cluster `row` into cluster `into`; the caller then drops `row`."""
        pair = [row, into]
        total = self.weights[pair] @ self.centroids[pair]
        self.centroids[into] = unit(total)
        self.weights[into] = self.weights[pair].sum()
        self.counts[into] = self.counts[pair].sum()
        self.seen[into] = self.seen[pair].max()


def condition(centroids: FloatArray, centre: FloatArray | None, reach: FloatArray) -> FloatArray:
    """What the hypernetwork is given for clusters: their mean prompt [K, d], at unit length.

    Seen from a centre that is as far as `reach` [K] from it, along the centroid.
    """
    return centroids.copy() if centre is None else unit(centre + reach[:, None] * centroids)
