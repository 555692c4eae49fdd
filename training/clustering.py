"""The clusters of a run, and how windows are assigned to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster_router.embedding import TokenEmbedder
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import FloatArray
from training.base import FrozenBase
from training.clusters import (
    Conditions,
    assign,
    embed_contexts,
    fit_snapshot,
    idf_weights,
    mutual_information,
)
from training.config import TrainSettings
from training.data import Window


@dataclass(frozen=True, eq=False)
class Clustering:
    """The clusters of a run and what embeds prompts for them.

    Attributes:
        embedder: embeds token sequences.
        token_weights: float32 [vocabulary], None for a plain mean.
        train: float32 [N, d], embeddings of the training contexts.
        snapshot: the clusters fitted on them.
    """

    embedder: TokenEmbedder
    token_weights: FloatArray | None
    train: FloatArray
    snapshot: ClusterSnapshot

    @classmethod
    def fit(
        cls, base: FrozenBase, windows: Sequence[Window], settings: TrainSettings
    ) -> Clustering:
        """Fit on the contexts of training windows; see `fit_snapshot` for errors."""
        weighted = settings.clusters.token_weights == "idf"
        weights = idf_weights(windows, base.embedding) if weighted else None
        embedder = TokenEmbedder(base.embedding, weights)
        embeddings = embed_contexts(windows, embedder)
        snapshot = fit_snapshot(embeddings, settings.clusters, settings.seed)
        return cls(embedder, weights, embeddings, snapshot)

    def conditions(self, windows: Sequence[Window]) -> Conditions:
        """What serving would condition each window on, from its own context."""
        rows = assign(embed_contexts(windows, self.embedder), self.snapshot)
        return Conditions.of(rows, self.snapshot)

    def agreement(self, windows: Sequence[Window]) -> float:
        """Normalised mutual information of clusters and domains."""
        rows = assign(embed_contexts(windows, self.embedder), self.snapshot)
        return mutual_information(rows, [window.domain for window in windows])
