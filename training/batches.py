"""Batches for training: random positions of random documents, with or without a cluster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cluster_router.wire.types import FloatArray
from training.clusters import Conditions
from training.config import HyperSettings
from training.episodes import Episode, log_uniform
from training.features import Features
from training.modules import Batch


def gather(
    features: Features,
    indices: Sequence[int],
    positions: int,
    random: np.random.Generator,
    conditions: Conditions | None = None,
) -> Batch:
    """Up to `positions` random scored tokens of each of the windows `indices`."""
    hidden, targets, owner = [], [], []
    for row, index in enumerate(indices):
        scored = features.windows[index].scored
        chosen = torch.from_numpy(random.permutation(scored)[:positions])
        hidden.append(features.hidden(index)[chosen])
        targets.append(features.targets(index)[chosen])
        owner.append(torch.full((len(chosen),), row))
    return Batch(torch.cat(hidden), torch.cat(targets), torch.cat(owner), conditions)


class StaticBatches:
    """Batches without conditions; one sampler of several draws its own sequence by `seed`."""

    def __init__(self, features: Features, documents: int, positions: int, seed: int) -> None:
        self._features = features
        self._documents = min(documents, len(features))
        self._positions = positions
        self._random = np.random.default_rng(seed)

    def draw(self) -> Batch:
        """The next batch."""
        indices = self._random.choice(len(self._features), self._documents, replace=False)
        return gather(self._features, indices.tolist(), self._positions, self._random)


class EpisodeBatches:
    """Batches under many different clusterings, so that thousands of conditions are seen.

    A document is conditioned on a random part of its cluster, itself left out, so that support is
    seen from one prompt up.
    """

    def __init__(
        self,
        features: Features,
        embeddings: FloatArray,
        episodes: Sequence[Episode],
        settings: HyperSettings,
        seed: int,
    ) -> None:
        self._features = features
        self._embeddings = embeddings
        self._episodes = episodes
        self._settings = settings
        self._random = np.random.default_rng(seed)

    def draw(self) -> Batch:
        """The next batch."""
        episode = self._episodes[int(self._random.integers(len(self._episodes)))]
        count = min(self._settings.documents, len(episode.windows))
        places = self._random.choice(len(episode.windows), count, replace=False)
        indices = episode.windows[places].tolist()
        drawn = [self._support(episode, int(place)) for place in places]
        conditions = Conditions(
            torch.from_numpy(np.stack([vector for vector, _ in drawn])),
            torch.tensor([support for _, support in drawn], dtype=torch.float32),
        )
        return gather(self._features, indices, self._settings.positions, self._random, conditions)

    def _support(self, episode: Episode, place: int) -> tuple[FloatArray, float]:
        """Unit mean of some of the document's cluster, and how many prompts those were."""
        members = episode.members(int(episode.rows[place]))
        others = members[members != episode.windows[place]]
        own = self._embeddings[episode.windows[place]]
        if len(others) == 0 or self._random.random() < self._settings.dropout:
            return own, 0.0
        support = log_uniform(self._random, 1, len(others))
        mean = self._embeddings[self._random.choice(others, support, replace=False)].mean(0)
        return mean / np.linalg.norm(mean), float(support)
