"""Variants: under which update each document of a group is scored.

Those of this module need the bundle's own clusters only; each document is judged by its own
context. What a document is scored under never depends on the other documents of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster_router.index import FaissIndex
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import Conditioning, FloatArray
from training.clusters import NO_CLUSTER, nearest
from training.data import Window
from training.evaluation.refinery import Refinery
from training.evaluation.scores import Scores
from training.evaluation.settings import EvaluateSettings
from training.evaluation.updates import Family, Task, Update, digest, noise_like, window_key
from training.statistics import Array


class Variant(Protocol):
    """One row of the report."""

    @property
    def name(self) -> str:
        """As in the report."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens that scoring takes through the model."""
        ...

    def nats(self, scores: Scores) -> Array:
        """Summed loss float64 [N] of each window of the group; NaN where it is not measured."""
        ...


@dataclass(frozen=True, eq=False)
class Scored:
    """A variant that is a task for each window; None where it is not measured."""

    name: str
    tasks: Sequence[Task | None]

    @property
    def tokens(self) -> int:
        """See `Variant.tokens`."""
        return sum(len(task.window.tokens) for task in self.tasks if task is not None)

    def nats(self, scores: Scores) -> Array:
        """See `Variant.nats`."""
        scores.work.label(self.name)
        return scores.nats(self.tasks)


def dice(window: Window, seed: int) -> np.random.Generator:
    """Random numbers that belong to one window, wherever it stands."""
    return np.random.default_rng([seed, int(window_key(window)[:12], 16)])


def softmax_weights(similarities: FloatArray, temperature: float) -> list[float]:
    """Weights that sum to 1, larger for the more similar."""
    powers = np.exp((similarities - similarities.max()) / temperature)
    return [float(weight) for weight in powers / powers.sum()]


def nearest_clusters(
    embedding: FloatArray, snapshot: ClusterSnapshot, settings: EvaluateSettings
) -> tuple[list[int], list[float]]:
    """Rows of the nearest clusters of an embedding [d] and the weights to merge them with."""
    index = FaissIndex(snapshot.centroids, "cpu")
    seen = snapshot.project(embedding[None])
    similarities, rows = index.search(seen, settings.merge_nearest)
    return rows[0].tolist(), softmax_weights(similarities[0], settings.merge_temperature)


class SnapshotUpdates:
    """Updates by the clusters that a bundle ships with.

    Args:
        refinery: of the bundle.
        windows: the group.
        embeddings: float32 [N, d], of their contexts.
        settings: of the evaluation.
    """

    def __init__(
        self,
        refinery: Refinery,
        windows: Sequence[Window],
        embeddings: FloatArray,
        settings: EvaluateSettings,
    ) -> None:
        self._refinery = refinery
        self._snapshot = refinery.bundle.snapshot
        self._windows = windows
        self._embeddings = embeddings
        self._settings = settings
        seen = self._snapshot.project(embeddings)
        self.similarities, self._nearest = nearest(seen, self._snapshot.centroids)
        inside = self.similarities >= self._snapshot.threshold
        self.rows = np.where(inside, self._nearest, NO_CLUSTER)

    def hyper(self, index: int) -> Update:
        """As it would be served."""
        return self._cluster(int(self.rows[index]))

    def nearest(self, index: int) -> Update:
        """Of the nearest cluster, however unlike it is."""
        return self._cluster(int(self._nearest[index]))

    def shuffled(self, index: int) -> Update:
        """Of a random other cluster."""
        row, count = int(self.rows[index]), len(self._snapshot)
        if row == NO_CLUSTER or count < 2:
            return self._cluster(row)
        step = dice(self._windows[index], self._settings.seed).integers(1, count)
        return self._cluster((row + int(step)) % count)

    def mean(self, index: int) -> Update:  # noqa: ARG002 the same for every window
        """The mean over all clusters, by size."""
        updates = [self._cluster(row) for row in range(len(self._snapshot))]
        return self._refinery.mean([float(size) for size in self._snapshot.sizes], updates)

    def noise(self, index: int) -> Update:
        """Of the norm of `hyper`, in a random direction."""
        return noise_of(
            self._refinery, self.hyper(index), self._windows[index], self._settings.seed
        )

    def own(self, index: int) -> Update:
        """Conditioned on this context as if it were a cluster of one."""
        vector = self._embeddings[index]
        return self._refinery.generate(Conditioning(vector=vector, support=1.0))

    def merge(self, index: int) -> Update:
        """The nearest clusters' updates, weighted by similarity."""
        if self.rows[index] == NO_CLUSTER:
            return self._refinery.static()
        rows, weights = nearest_clusters(self._embeddings[index], self._snapshot, self._settings)
        return self._refinery.mean(weights, [self._cluster(row) for row in rows])

    def _cluster(self, row: int) -> Update:
        if row == NO_CLUSTER:
            return self._refinery.static()
        return self._refinery.generate(self._snapshot.conditioning_of(row))


def noise_of(refinery: Refinery, update: Update, window: Window, seed: int) -> Update:
    """A random update of the norm of `update`; where nothing is generated, there is no noise."""
    if update.make is None:
        return update
    number = int(dice(window, seed).integers(2**31))
    key = digest("noise", update.key, number)
    return refinery.update(key, lambda: noise_like(update.generated(), number))


@dataclass(frozen=True, eq=False)
class Baselines:
    """Updates that do not come from the bundle.

    Attributes:
        unadapted: the base model.
        static: trained alone on the same tokens.
        budget: with the hypernetwork's whole trainable budget, where there is one.
    """

    unadapted: Family
    static: Family
    budget: Family | None = None


def snapshot_variants(
    names: Sequence[str],
    updates: SnapshotUpdates,
    baselines: Baselines,
    windows: Sequence[Window],
) -> list[Scored]:
    """Those of `names` that need no stream and for which there is what they need."""
    makers: dict[str, Callable[[int], Update]] = {
        "base": lambda _: Update.static(baselines.unadapted),
        "static": lambda _: Update.static(baselines.static),
        "hyper": updates.hyper,
        "nearest": updates.nearest,
        "shuffled": updates.shuffled,
        "mean": updates.mean,
        "noise": updates.noise,
        "own": updates.own,
        "merge": updates.merge,
    }
    if (budget := baselines.budget) is not None:
        makers["budget_static"] = lambda _: Update.static(budget)
    return [
        Scored(name, [Task(window, makers[name](index)) for index, window in enumerate(windows)])
        for name in names
        if name in makers
    ]
