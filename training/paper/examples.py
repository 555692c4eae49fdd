"""What either protocol trains and scores on: hidden states, targets, and batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import faiss
import numpy as np
import torch
from torch.nn.functional import normalize

from training.features import Features

UNSCORED = -1
"""Target of a position that no loss counts."""


@dataclass(frozen=True, eq=False)
class Examples:
    """N texts with P scored positions each.

    Attributes:
        hidden: bfloat16 [N, P, d], final hidden states.
        targets: int64 [N, P], what each is scored against; UNSCORED leaves a position out.
        embeddings: float32 [N, d], unit length. A batch's condition is their mean.
        batches: rows of each batch.
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    embeddings: torch.Tensor
    batches: tuple[torch.Tensor, ...] = ()

    def batched(self, size: int, iterations: int, seed: int) -> Examples:
        """The same texts in batches of like ones; see `clustered_batches`."""
        batches = clustered_batches(self.embeddings, size, iterations, seed)
        return replace(self, batches=batches)

    def condition(self, batch: int) -> torch.Tensor:
        """float32 [d]: the mean of a batch's embeddings."""
        return self.embeddings[self.batches[batch]].mean(0)


class Splits(NamedTuple):
    """What is trained on, and what chooses the epoch."""

    training: Examples
    validation: Examples

    def batched(self, size: int, iterations: int, seed: int) -> Splits:
        """Each in batches of its own texts."""
        return Splits(*(part.batched(size, iterations, seed) for part in self))


def published_examples(
    sequences: torch.Tensor, positions: torch.Tensor, states: torch.Tensor, embedding: torch.Tensor
) -> tuple[Examples, Examples]:
    """The two losses that the authors' code knows, padding scored in both.

    Args:
        sequences: int64 [N, T], padding included.
        positions: int64 [N, P + 1], the last column T - 1.
        states: bfloat16 [N, P + 1, d].
        embedding: [vocabulary, d], the model's input embedding.

    Returns:
        The last position against its own token (token 0 left out, as `ignore_index=0` does), and
        the other P positions against the next token.
    """
    embeddings = embed_padded(sequences, embedding)
    last = sequences[:, -1:]
    following = sequences.gather(1, positions[:, :-1] + 1)
    return (
        Examples(states[:, -1:], last.where(last != 0, UNSCORED), embeddings),
        Examples(states[:, :-1], following, embeddings),
    )


def honest_examples(features: Features, embedding: torch.Tensor) -> Examples:
    """Windows with every token after the context scored; only the context is embedded."""
    rows = range(len(features))
    contexts = torch.from_numpy(np.stack([w.context_tokens for w in features.windows]))
    return Examples(
        torch.stack([features.hidden(i) for i in rows]),
        torch.stack([features.targets(i) for i in rows]),
        embed_padded(contexts.long(), embedding),
    )


def embed_padded(sequences: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """float32 [N, d]: unit mean of the token embeddings over every position, padding included."""
    parts = [embedding[rows].float().mean(1) for rows in sequences.split(64)]
    return normalize(torch.cat(parts), dim=1)


def clustered_batches(
    embeddings: torch.Tensor, size: int, iterations: int, seed: int
) -> tuple[torch.Tensor, ...]:
    """The paper's batches: k-means into (N // size) clusters, each shuffled and cut.

    Returns:
        int64 rows of each batch, at most `size`; every row is in exactly one.
    """
    points = embeddings.numpy()
    kmeans = faiss.Kmeans(
        points.shape[1],
        max(1, len(points) // size),
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,  # silences a warning; few points a cluster are the design
    )
    kmeans.train(points)
    clusters = kmeans.index.search(points, 1)[1][:, 0]
    random = np.random.default_rng(seed)
    batches: list[torch.Tensor] = []
    for cluster in np.unique(clusters):
        rows = random.permutation(np.flatnonzero(clusters == cluster))
        batches.extend(torch.from_numpy(rows).split(size))
    return tuple(batches)
