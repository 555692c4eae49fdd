"""CentroidLearner: mini-batch spherical k-means with forgetting, over a stream that never ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster_router.learning.centring import measure_reach, move_origin
from cluster_router.learning.config import LearnerConfig
from cluster_router.learning.restructure import NO_THRESHOLD, Fit, restructure
from cluster_router.learning.structure import nearest
from cluster_router.learning.table import UNPUBLISHED, ClusterTable, condition
from cluster_router.learning.window import Window
from cluster_router.wire.errors import BundleError, RequestError
from cluster_router.wire.snapshot import ClusterSnapshot, project, unit
from cluster_router.wire.types import FloatArray

State = Mapping[str, NDArray[Any]]

_BATCH = 32  # embeddings assigned to the same centroids before these move
_ROWS = ("weights", "counts", "seen", "anchors")
_SCALARS = ("clock", "next_id", "spread")


class CentroidLearner:
    """The only writer of clusters: one stream in, snapshots out. Not thread-safe.

    What it publishes is a function of the embeddings, their order and the moments of `snapshot`
    alone: no random numbers, and how calls of `learn` cut the stream makes no difference.

    Args:
        start: clusters to begin with, a bundle's for one. They keep their ids.
        config: the settings.
        state: what `state` returned beside `start`, to go on where another learner stopped.
        first_id: smallest id that a new cluster may get.

    Raises:
        BundleError: `state` does not belong to `start`.
    """

    def __init__(
        self,
        start: ClusterSnapshot,
        config: LearnerConfig | None = None,
        state: State | None = None,
        first_id: int = 0,
    ) -> None:
        self._config = config or LearnerConfig()
        self._snapshot = start
        self._table = ClusterTable.of(start, self._config.memory, first_id)
        self._centre = start.centre
        self._mean = start.mean.copy()
        self._mean_weight = int(start.sizes.sum())
        self._fit = Fit(start.threshold, spread=0.0)
        self._clock = 0
        if state is not None:
            self._restore(state)
        self._published_at = self._restructured_at = self._clock
        self._window = Window(self._config.window, start.dim)
        self._pending = np.empty((0, start.dim), np.float32)

    def __len__(self) -> int:
        """How many clusters there are now, published or not."""
        return len(self._table)

    def learn(self, embeddings: FloatArray) -> None:
        """Learn from prompts, oldest first.

        Args:
            embeddings: [N, d], finite. Rows are scaled to unit length; rows of zeros are left out.

        Raises:
            RequestError: the shape is wrong or a number is not finite; nothing was learned.
        """
        rows = np.asarray(embeddings, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self._snapshot.dim:
            raise RequestError(f"embeddings must be [N, {self._snapshot.dim}], got {rows.shape}")
        if not np.isfinite(rows).all():
            raise RequestError("embeddings hold NaN or infinity; send finite numbers")
        rows = np.concatenate([self._pending, unit(rows[rows.any(1)])])
        whole = len(rows) // _BATCH * _BATCH
        self._pending = rows[whole:].copy()
        for start in range(0, whole, _BATCH):
            self._learn(rows[start : start + _BATCH])

    def snapshot(self) -> ClusterSnapshot:
        """Publish what has been learned: a new version, or the last one if nothing was.

        A cluster's version, and with it its conditioning and its size, moves only when its
        centroid has turned by more than `drift` or its support has grown by `growth` since they
        last did: equal adapter keys stay equal weights. Centroids and mean are always the newest.
        """
        if len(self._pending):
            pending, self._pending = self._pending, self._pending[:0]
            self._learn(pending)
        if self._clock > self._published_at:
            self._published_at = self._clock
            self._snapshot = self._publish(self._snapshot.version + 1)
        return self._snapshot

    def renumber(self, by: int) -> None:
        """Add `by` to the id of every cluster there is or will be.

        Only for a learner that has published nothing yet: ids are names.
        """
        self._table.ids += by
        self._table.next_id += by
        self._snapshot = replace(self._snapshot, ids=_frozen(self._snapshot.ids + by))

    def state(self) -> State:
        """What going on from the last snapshot takes beside it; holds no prompt's embedding.

        To be asked for right after `snapshot`, before more is learned.
        """
        assert self._clock == self._published_at, "ask for the state right after snapshot()"
        rows = {name: getattr(self._table, name).copy() for name in self._rows}
        scalars = (self._clock, self._table.next_id, self._fit.spread)
        return rows | {
            name: np.array([value]) for name, value in zip(_SCALARS, scalars, strict=True)
        }

    @property
    def _rows(self) -> tuple[str, ...]:
        """Columns of the table that no snapshot shows."""
        return _ROWS if self._centre is None else (*_ROWS, "reach")

    def _restore(self, state: State) -> None:
        if missing := {*self._rows, *_SCALARS} - set(state):
            raise BundleError(f"learner state: {sorted(missing)[0]} is missing")
        for name in self._rows:
            current, stored = getattr(self._table, name), np.array(state[name])
            if stored.shape != current.shape or stored.dtype != current.dtype:
                raise BundleError(f"learner state: {name} does not fit the snapshot")
            setattr(self._table, name, stored)
        self._clock = int(state["clock"][0])
        self._table.next_id = max(self._table.next_id, int(state["next_id"][0]))
        self._fit = Fit(self._fit.threshold, float(state["spread"][0]))

    def _learn(self, batch: FloatArray) -> None:
        self._clock += len(batch)
        memory = self._config.memory * max(1, len(self._table))
        self._mean_weight = min(self._mean_weight + len(batch), memory)
        self._mean += np.float32(len(batch) / self._mean_weight) * (batch.mean(0) - self._mean)
        self._window.add(batch)
        if len(self._table):
            self._move(project(batch, self._centre))
        # A new stream is looked at sooner: whenever it has grown by half.
        due = min(self._config.interval, max(_BATCH, self._restructured_at // 2))
        if self._clock - self._restructured_at >= due:
            self._restructured_at = self._clock
            self._restructure(self._window.embeddings())

    def _restructure(self, window: FloatArray) -> None:
        table, after = self._table, self._config.centre_after
        if self._centre is None and after is not None and self._clock >= after:
            self._centre = _frozen(self._mean)
            move_origin(table, window, self._fit.threshold, self._centre)
            self._fit = Fit(NO_THRESHOLD, spread=0.0)
        points = project(window, self._centre)
        self._fit = restructure(table, points, self._fit, self._clock, self._config)
        if self._centre is not None:
            measure_reach(table, window, self._centre)

    def _move(self, batch: FloatArray) -> None:
        """Move each centroid towards its new members in `batch`, as seen from the centre."""
        table = self._table
        similarities, rows = nearest(batch, table.centroids)
        inside = similarities >= self._fit.threshold
        touched, hits = np.unique(rows[inside], return_counts=True)
        sums = (rows[inside] == touched[:, None]).astype(np.float32) @ batch[inside]  # [T, d]
        weights = table.weights[touched]
        table.centroids[touched] = unit(weights[:, None] * table.centroids[touched] + sums)
        table.weights[touched] = np.minimum(weights + hits, self._config.memory)
        table.counts[touched] += hits
        table.seen[touched] = self._clock

    def _publish(self, version: int) -> ClusterSnapshot:
        table = self._table
        moved = self._moved()
        table.versions[moved] = version
        table.anchors[moved] = table.centroids[moved]
        table.support[moved] = table.counts[moved]
        table.conditioning[moved] = condition(
            table.centroids[moved], self._centre, table.reach[moved]
        )
        return ClusterSnapshot(
            version=version,
            ids=_frozen(table.ids),
            centroids=_frozen(table.centroids),
            sizes=_frozen(table.support),
            versions=_frozen(table.versions),
            conditioning=_frozen(table.conditioning),
            mean=_frozen(self._mean),
            threshold=self._fit.threshold,
            centre=self._centre,
        )

    def _moved(self) -> NDArray[np.bool_]:
        """Which clusters [K] need their update generated anew."""
        table = self._table
        turned = 1 - np.einsum("kd,kd->k", table.anchors, table.centroids)
        # Before the spread is known, at the start of a stream, nothing counts as drift.
        drifted = (self._fit.spread > 0) & (turned > self._config.drift * self._fit.spread)
        grown = table.counts >= self._config.growth * np.maximum(table.support, 1)
        grown &= table.support < self._config.settled
        return drifted | grown | (table.versions == UNPUBLISHED)


def _frozen(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that nobody can write to."""
    copy = values.copy()
    copy.flags.writeable = False
    return copy
