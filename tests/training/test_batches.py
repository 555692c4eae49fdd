"""Training batches and the conditions they come with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.batches import EpisodeBatches, StaticBatches
from training.config import HyperSettings
from training.data import Window
from training.episodes import draw_episodes
from training.features import Features

DOCUMENTS, SCORED, DIM = 40, 10, 6


@pytest.fixture
def features() -> Features:
    """Row i of document d holds d and i, so that a batch shows where it came from."""
    windows = [
        Window(np.full(SCORED + 4, d, np.int32), 4, "ab"[d % 2], 1) for d in range(DOCUMENTS)
    ]
    rows = [
        torch.stack([torch.tensor([d, i] + [0] * (DIM - 2)) for i in range(SCORED)])
        for d in range(DOCUMENTS)
    ]
    return Features(windows, [row.to(torch.bfloat16) for row in rows])


@pytest.fixture
def embeddings() -> np.ndarray:
    """Even documents point one way, odd ones another."""
    random = np.random.default_rng(0)
    points = np.eye(DIM, dtype=np.float32)[np.arange(DOCUMENTS) % 2]
    points = points + 0.01 * random.standard_normal(points.shape, np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _settings(**changes: object) -> HyperSettings:
    return HyperSettings.model_validate(
        {"documents": 8, "positions": 4, "episodes": 3, "clusters": [2, 2], "dropout": 0, **changes}
    )


def _sampler(features: Features, embeddings: np.ndarray, settings: HyperSettings) -> EpisodeBatches:
    episodes = draw_episodes(embeddings, settings, seed=0)
    return EpisodeBatches(features, embeddings, episodes, settings, seed=0)


def test_positions_are_distinct_and_targets_belong_to_their_document(features: Features) -> None:
    batch = StaticBatches(features, documents=8, positions=4, seed=0).draw()
    assert batch.hidden.shape == (32, DIM)
    assert len({tuple(row) for row in batch.hidden[:, :2].tolist()}) == 32
    assert torch.equal(batch.hidden[:, 0].long(), batch.targets)
    assert batch.owner.tolist() == np.repeat(np.arange(8), 4).tolist()


def test_samplers_are_a_function_of_their_seed(features: Features) -> None:
    first, same, other = (StaticBatches(features, 8, 4, seed).draw() for seed in (0, 0, 1))
    assert torch.equal(first.hidden, same.hidden)
    assert not torch.equal(first.hidden, other.hidden)


def test_a_document_is_conditioned_on_its_own_cluster_without_itself(
    features: Features, embeddings: np.ndarray
) -> None:
    sampler = _sampler(features, embeddings, _settings())
    supports = set()
    for _ in range(10):
        batch = sampler.draw()
        assert batch.conditions is not None
        documents = batch.hidden[::4, 0].long()
        sides = batch.conditions.vectors[:, :2].argmax(dim=1)
        assert torch.equal(sides, documents % 2)
        own = torch.from_numpy(embeddings)[documents]
        assert not torch.isclose(batch.conditions.vectors, own, atol=1e-7).all(dim=1).any()
        supports |= set(batch.conditions.support.tolist())
    assert 1.0 in supports
    assert max(supports) > 4


def test_dropped_conditions_have_no_support(features: Features, embeddings: np.ndarray) -> None:
    sampler = _sampler(features, embeddings, _settings(dropout=0.5, documents=20))
    drawn = [sampler.draw().conditions for _ in range(10)]
    share = np.mean([float((c.support == 0).float().mean()) for c in drawn if c is not None])
    assert 0.3 < share < 0.7
