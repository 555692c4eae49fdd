"""The clusters a bundle starts with, fitted on the contexts of training documents only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cluster_router.embedding import TokenEmbedder
from cluster_router.index import FaissIndex, spherical_kmeans
from cluster_router.wire.errors import ConfigError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import FloatArray
from training.config import ClusterSettings
from training.data import Window

IntArray = NDArray[np.int64]
NO_CLUSTER = -1


def idf_weights(windows: Sequence[Window], embedding: torch.Tensor) -> FloatArray:
    """How much each token counts in a prompt's mean: its inverse document frequency in `windows`.

    Divided by the length of the token's embedding, so that no token counts more for a long vector.
    A token of no context counts as much as one of a single context; never below zero.

    Returns:
        float32 [vocabulary], at most 1.
    """
    frequency = np.zeros(len(embedding), np.int64)
    for window in windows:
        frequency[np.unique(window.content_tokens)] += 1
    idf = np.log((len(windows) + 1) / np.maximum(frequency, 1))
    weights = idf / embedding.float().norm(dim=1).clamp_min(1e-6).numpy()
    return np.asarray(weights / weights.max(), np.float32)


def embed_contexts(windows: Sequence[Window], embedder: TokenEmbedder) -> FloatArray:
    """Embeddings float32 [N, d] of the content tokens alone."""
    return np.stack([embedder.embed(window.content_tokens.tolist()) for window in windows])


def nearest(embeddings: FloatArray, centroids: FloatArray) -> tuple[FloatArray, IntArray]:
    """Similarity float32 [N] and row int64 [N] of the nearest centroid of each embedding."""
    similarities, rows = FaissIndex(centroids, "cpu").search(embeddings, 1)
    return similarities[:, 0], rows[:, 0]


def unit_means(embeddings: FloatArray, rows: IntArray, count: int) -> FloatArray:
    """Unit-length mean float32 [count, d] of the embeddings assigned to each row."""
    sums = np.zeros((count, embeddings.shape[1]), np.float32)
    np.add.at(sums, rows, embeddings)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.maximum(norms, np.finfo(np.float32).tiny)


def fit_snapshot(embeddings: FloatArray, settings: ClusterSettings, seed: int) -> ClusterSnapshot:
    """Cluster training contexts; the conditioning of a cluster is its centroid.

    Raises:
        ConfigError: there are fewer contexts than clusters.
    """
    if len(embeddings) < settings.count:
        raise ConfigError(
            f"{len(embeddings)} training documents cannot make {settings.count} clusters; "
            "lower clusters.count or add documents",
            "clusters.count",
        )
    centroids = spherical_kmeans(embeddings, settings.count, seed, "cpu")
    _, rows = nearest(embeddings, centroids)
    occupied = np.unique(rows)
    rows = np.searchsorted(occupied, rows)
    centroids = unit_means(embeddings, rows, len(occupied))
    similarities, rows = nearest(embeddings, centroids)
    sizes = np.bincount(rows, minlength=len(centroids)).astype(np.int64)
    return ClusterSnapshot(
        version=1,
        ids=np.arange(len(centroids), dtype=np.int64),
        centroids=centroids,
        sizes=sizes,
        versions=np.ones(len(centroids), np.int64),
        conditioning=centroids.copy(),
        mean=embeddings.mean(0, dtype=np.float32),
        threshold=float(np.percentile(similarities, settings.threshold_percentile)),
    )


def assign(embeddings: FloatArray, snapshot: ClusterSnapshot) -> IntArray:
    """Row int64 [N] of each embedding's cluster, NO_CLUSTER where it resembles none."""
    similarities, rows = nearest(embeddings, snapshot.centroids)
    return np.where(similarities >= snapshot.threshold, rows, NO_CLUSTER)


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the hypernetwork is given for each of N windows.

    `vectors` float32 [N, c], `support` float32 [N]; support 0 asks for the static update.
    """

    vectors: torch.Tensor
    support: torch.Tensor

    @classmethod
    def of(cls, rows: IntArray, snapshot: ClusterSnapshot) -> Conditions:
        """The conditions of windows assigned to `rows` of `snapshot`."""
        vectors = torch.from_numpy(snapshot.conditioning[rows])
        support = np.where(rows == NO_CLUSTER, 0, snapshot.sizes[rows])
        return cls(vectors, torch.from_numpy(support.astype(np.float32)))

    def take(self, indices: Sequence[int]) -> Conditions:
        """The conditions of some of the windows."""
        return Conditions(self.vectors[list(indices)], self.support[list(indices)])


def shuffled(rows: IntArray, snapshot: ClusterSnapshot, seed: int) -> IntArray:
    """Each assigned window moved to a random other cluster: the control for conditioning."""
    random = np.random.default_rng(seed)
    moved = (rows + random.integers(1, max(2, len(snapshot)), len(rows))) % len(snapshot)
    return np.where(rows == NO_CLUSTER, NO_CLUSTER, moved)


def mutual_information(rows: IntArray, labels: Sequence[str]) -> float:
    """Normalised mutual information of clusters and labels in [0, 1], arithmetic mean form."""
    names, columns = np.unique(np.asarray(labels), return_inverse=True)
    values, indices = np.unique(rows, return_inverse=True)
    joint = np.zeros((len(values), len(names)))
    np.add.at(joint, (indices, columns), 1 / len(rows))
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    information = (joint[seen] * np.log(joint[seen] / outer[seen])).sum()
    entropy = sum(-(p * np.log(p)).sum() for p in (joint.sum(0), joint.sum(1)))
    return float(2 * information / entropy) if entropy > 0 else 1.0
