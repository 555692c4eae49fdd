"""Batches for training: random positions of random documents, with or without a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster_router.wire.types import FloatArray
from training.clusters import Conditions
from training.config import HyperSettings
from training.episodes import Episode, log_uniform
from training.features import Features
from training.modules import Batch
from training.objective import Candidates, CandidateSampler
from training.shares import Seed, Share, Split


def gather(
    features: Features,
    indices: Sequence[int],
    positions: int,
    random: np.random.Generator,
    conditions: Conditions | None = None,
) -> Batch:
    """Up to `positions` random scored tokens of each of the windows `indices`."""
    picked = Picked.draw(features, indices, positions, random, conditions)
    return picked.batch(range(len(indices)))


@dataclass(frozen=True, eq=False)
class Picked:
    """Which tokens a batch scores, before their hidden states are read.

    Attributes:
        features: where they come from.
        indices: windows.
        positions: int64 [n], the scored tokens taken of each window.
        conditions: of each window; None asks for the static update.
        candidates: of the whole batch; None takes the whole vocabulary.
    """

    features: Features
    indices: Sequence[int]
    positions: Sequence[Tensor]
    conditions: Conditions | None = None
    candidates: Candidates | None = None

    @classmethod
    def draw(
        cls,
        features: Features,
        indices: Sequence[int],
        positions: int,
        random: np.random.Generator,
        conditions: Conditions | None = None,
        sampler: CandidateSampler | None = None,
    ) -> Picked:
        """Up to `positions` random tokens of each window, and candidates for all of them."""
        chosen = [
            torch.from_numpy(random.permutation(features.windows[index].scored)[:positions])
            for index in indices
        ]
        candidates = None
        if sampler is not None:
            pairs = zip(indices, chosen, strict=True)
            targets = torch.cat([features.targets(index)[rows] for index, rows in pairs])
            candidates = sampler.draw(targets, int(random.integers(2**31)))
        return cls(features, indices, chosen, conditions, candidates)

    def batch(self, rows: range) -> Batch:
        """The batch of the windows in places `rows`."""
        pairs = [(self.indices[row], self.positions[row]) for row in rows]
        counts = torch.tensor([len(chosen) for _, chosen in pairs])
        return Batch(
            hidden=torch.cat([self.features.hidden(index)[chosen] for index, chosen in pairs]),
            targets=torch.cat([self.features.targets(index)[chosen] for index, chosen in pairs]),
            owner=torch.repeat_interleave(torch.arange(len(pairs)), counts),
            conditions=None if self.conditions is None else self.conditions.take(rows),
            candidates=self.candidates,
        )

    def shares(self, split: Split, seed: Seed, step: int) -> list[Share[Batch]]:
        """What one worker takes of it; see `Split.rows` for errors."""
        documents = len(self.indices)
        tokens = sum(len(chosen) for chosen in self.positions)
        return [
            Share(
                batch=self.batch(rows),
                all_tokens=tokens,
                of_tokens=sum(len(self.positions[row]) for row in rows) / tokens,
                of_documents=len(rows) / documents,
                seed=seed.number(step, rows.start),
            )
            for rows in split.rows(documents)
        ]


class StaticBatches:
    """Batches without conditions.

    Args:
        features: to draw from.
        documents: in a global batch; at most as many as there are.
        positions: scored tokens of each.
        seed: of everything drawn.
        sampler: of the candidates that the loss normalises over; None for the whole vocabulary.
    """

    def __init__(
        self,
        features: Features,
        documents: int,
        positions: int,
        seed: Seed,
        sampler: CandidateSampler | None = None,
    ) -> None:
        self._features = features
        self._documents = min(documents, len(features))
        self._positions = positions
        self._seed = seed
        self._sampler = sampler

    def draw(self, step: int, split: Split) -> list[Share[Batch]]:
        """See `Batches.draw`."""
        random = self._seed.generator(step)
        indices = random.choice(len(self._features), self._documents, replace=False).tolist()
        picked = Picked.draw(
            self._features, indices, self._positions, random, sampler=self._sampler
        )
        return picked.shares(split, self._seed, step)


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
        seed: Seed,
        sampler: CandidateSampler | None = None,
    ) -> None:
        self._features = features
        self._embeddings = embeddings
        self._episodes = episodes
        self._settings = settings
        self._seed = seed
        self._sampler = sampler

    def draw(self, step: int, split: Split) -> list[Share[Batch]]:
        """See `Batches.draw`."""
        random = self._seed.generator(step)
        episode = self._episodes[int(random.integers(len(self._episodes)))]
        count = min(self._settings.documents, len(episode.windows))
        places = random.choice(len(episode.windows), count, replace=False)
        drawn = [self._support(episode, int(place), random) for place in places]
        conditions = Conditions(
            torch.from_numpy(np.stack([vector for vector, _ in drawn])),
            torch.tensor([support for _, support in drawn], dtype=torch.float32),
        )
        picked = Picked.draw(
            self._features,
            episode.windows[places].tolist(),
            self._settings.positions,
            random,
            conditions,
            self._sampler,
        )
        return picked.shares(split, self._seed, step)

    def _support(
        self, episode: Episode, place: int, random: np.random.Generator
    ) -> tuple[FloatArray, float]:
        """Unit mean of some of the document's cluster, and how many prompts those were."""
        members = episode.members(int(episode.rows[place]))
        others = members[members != episode.windows[place]]
        own = self._embeddings[episode.windows[place]]
        if len(others) == 0 or random.random() < self._settings.dropout:
            return own, 0.0
        support = log_uniform(random, 1, len(others))
        mean = self._embeddings[random.choice(others, support, replace=False)].mean(0)
        return mean / np.linalg.norm(mean), float(support)
