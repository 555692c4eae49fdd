"""Retire, spawn, merge and split: the slow half of learning, on the window of recent embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster_router.learning.config import LearnerConfig
from cluster_router.learning.structure import OUTSIDE, Split, View, bisect, cheapest_merge, densest
from cluster_router.learning.table import ClusterTable
from cluster_router.wire.snapshot import unit
from cluster_router.wire.types import FloatArray

_REPLACE = 2.0  # at the limit, a newcomer must gain this many times what making room loses
_THRESHOLD_RATE = 0.1  # so slow that novel traffic is spawned before the threshold lets it in
# Traffic under one fixed prompt embeds all alike: at a cosine of 1 rounding alone would decide
# which prompts belong to no cluster, and at a spread of 0 which clusters have drifted.
_MAX_THRESHOLD = 1.0 - 1e-3
_MIN_SPREAD = 1e-3
NO_THRESHOLD = -1.0
"""Threshold of a fit that is still to be found: every prompt belongs to its nearest cluster."""


@dataclass(frozen=True)
class Fit:
    """How the traffic fits its clusters.

    Attributes:
        threshold: cosine under which a prompt belongs to no cluster.
        spread: mean cosine distance between prompts and their centroids; 0 until it is known,
            from then on never under what rounding may make of it.
    """

    threshold: float
    spread: float


def restructure(
    table: ClusterTable, window: FloatArray, fit: Fit, now: int, config: LearnerConfig
) -> Fit:
    """Change `table` to suit `window` [n, d], n > 0, at time `now`; returns the fit it then has."""
    table.keep(now - table.seen < config.idle)
    threshold = fit.threshold
    if len(table) == 0:
        table.append(unit(window.sum(0)), min(len(window), config.memory), now)
        threshold = NO_THRESHOLD
    for step in (_Round.spawn, _Round.merge, _Round.split, _Round.settle):
        step(_Round(table, config, now, View.of(window, table.centroids, threshold), threshold))
    view = View.of(window, table.centroids, threshold)
    estimate = float(np.percentile(view.similarities, config.threshold_percentile))
    rate = 1.0 if threshold == NO_THRESHOLD else _THRESHOLD_RATE
    inside = view.similarities[view.rows != OUTSIDE]
    spread = max(_MIN_SPREAD, 1.0 - float(inside.mean())) if len(inside) else fit.spread
    return Fit(min(_MAX_THRESHOLD, threshold + rate * (estimate - threshold)), spread)


@dataclass(frozen=True, eq=False)
class _Round:
    """One change of structure. `view` is of the table as it was before."""

    table: ClusterTable
    config: LearnerConfig
    now: int
    view: View
    threshold: float

    @property
    def _price(self) -> float:
        """What a new cluster must gain."""
        return self.config.split_gain * self.view.dispersion

    @property
    def _window_is_full(self) -> bool:
        return len(self.view.rows) >= self.config.window

    def spawn(self) -> None:
        """Give traffic that resembles no cluster clusters of its own."""
        outside = self.view.members(OUTSIDE)
        best = self.view.similarities[self.view.rows == OUTSIDE]
        while found := densest(outside, self.threshold, self.config.min_size):
            centroid, size = found
            gains = outside @ centroid - best
            if not self._place(centroid, size, float(gains[gains > 0].sum())):
                return
            rest = outside @ centroid < self.threshold
            outside, best = outside[rest], best[rest]

    def _place(self, centroid: FloatArray, size: int, gain: float) -> bool:
        """Add a cluster if it is worth it; whether `view` still holds but for added rows."""
        table = self.table
        full = len(table) >= self.config.max_clusters
        if gain < self._price or (full and len(table) > len(self.view.counts)):
            return False
        room = self._room(gain) if full else ()
        if room is not None:
            table.append(centroid, min(size, self.config.memory), self.now)
            self._vacate(room)
        return not full

    def merge(self) -> None:
        """Make one of the two clusters that are most nearly the same.

        Where a bundle began with more clusters than there may be, or the limit was lowered, one
        cluster goes each time, as soon as a full window can tell which is the least useful.
        """
        merge = cheapest_merge(self.view, self.config.min_size)
        if merge is not None and merge.loss < self.config.merge_loss * self.view.dispersion:
            self._vacate(merge.rows)
        elif len(self.table) > self.config.max_clusters and self._window_is_full:
            self._vacate(self._room(math.inf) or ())

    def split(self) -> None:
        """Split what is worth it: all there is room for, or else the best, in place of another."""
        config = self.config
        rows = np.flatnonzero(self.view.counts >= 2 * config.min_size).tolist()
        found = [bisect(self.view.members(row), row, config.min_size) for row in rows]
        splits = [split for split in found if split and split.gain >= self._price]
        splits.sort(key=lambda split: -split.gain)
        free = max(0, config.max_clusters - len(self.table))
        for split in splits[:free]:
            self._apply(split)
        if free == 0 and splits:
            room = self._room(splits[0].gain, keep=splits[0].row)
            if room is not None:
                self._apply(splits[0])
                self._vacate(room)

    def settle(self) -> None:
        """Half a step of k-means over the window: clusters give way to a new neighbour at once."""
        view, centroids = self.view, self.table.centroids
        rows = np.flatnonzero(view.counts >= self.config.min_size)
        centroids[rows] = unit(view.sums[rows] + view.counts[rows, None] * centroids[rows])

    def _apply(self, split: Split) -> None:
        """The larger half goes on under the old id, the smaller gets a new one."""
        table, row = self.table, split.row
        share = split.sizes[0] / sum(split.sizes)
        table.centroids[row] = split.centroids[0]
        table.weights[row] *= np.float32(share)
        moved = int(table.counts[row] * (1 - share))
        table.counts[row] -= moved
        table.append(split.centroids[1], min(split.sizes[1], self.config.memory), self.now)

    def _room(self, gain: float, keep: int | None = None) -> tuple[int, ...] | None:
        """Rows to vacate, not `keep`, for a newcomer that gains `gain`; None: not worth it."""
        counts = self.view.counts.copy()
        if keep is not None:
            counts[keep] = len(self.view.rows)
        least = int(np.lexsort((self.table.seen, counts))[0])
        if counts[least] < self.config.min_size:
            return (least,)
        merge = cheapest_merge(self.view, self.config.min_size, keep)
        return merge.rows if merge and gain > _REPLACE * merge.loss else None

    def _vacate(self, rows: tuple[int, ...]) -> None:
        """Drop one cluster, or fold the lighter of two into the other."""
        if not rows:  # there was a free place
            return
        table = self.table
        victim = min(rows, key=lambda row: (table.weights[row], row))
        if len(rows) == 2:
            table.fold(victim, into=rows[0] if victim == rows[1] else rows[1])
        table.keep(np.arange(len(table)) != victim)
