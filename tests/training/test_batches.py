"""Training batches and the conditions they come with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster_router.wire.errors import ConfigError
from training.batches import EpisodeBatches, StaticBatches
from training.config import HyperSettings
from training.data import Window
from training.episodes import draw_episodes
from training.features import Features
from training.modules import Batch
from training.objective import CandidateSampler
from training.shares import Seed, Share, Split

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
    return EpisodeBatches(features, embeddings, episodes, settings, Seed(0, "test"))


def _whole(shares: list[Share[Batch]]) -> Batch:
    [share] = shares
    assert (share.of_tokens, share.of_documents) == (1.0, 1.0)
    return share.batch


def test_positions_are_distinct_and_targets_belong_to_their_document(features: Features) -> None:
    batch = _whole(StaticBatches(features, 8, 4, Seed(0, "test")).draw(1, Split()))
    assert batch.hidden.shape == (32, DIM)
    assert len({tuple(row) for row in batch.hidden[:, :2].tolist()}) == 32
    assert torch.equal(batch.hidden[:, 0].long(), batch.targets)
    assert batch.owner.tolist() == np.repeat(np.arange(8), 4).tolist()


def test_a_batch_is_a_function_of_seed_stage_and_step(features: Features) -> None:
    def draw(run: int, stage: str, step: int) -> list[list[float]]:
        source = StaticBatches(features, 8, 4, Seed(run, stage))
        source.draw(99, Split())
        return _whole(source.draw(step, Split())).hidden.tolist()

    assert draw(0, "a", 1) == draw(0, "a", 1)
    others = [draw(1, "a", 1), draw(0, "b", 1), draw(0, "a", 2)]
    assert all(other != draw(0, "a", 1) for other in others)


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (1, 2), (3, 2)])
def test_the_shares_of_all_workers_are_the_global_batch(
    features: Features, embeddings: np.ndarray, world: int, accumulate: int
) -> None:
    features.windows[3] = Window(np.full(3 + 4, 3, np.int32), 4, "b", 1)
    source = _sampler(features, embeddings, _settings(documents=20))
    whole = _whole(source.draw(5, Split()))
    splits = [Split(rank, world, accumulate) for rank in range(world)]
    shares = [share for split in splits for share in source.draw(5, split)]
    assert torch.equal(torch.cat([share.batch.hidden for share in shares]), whole.hidden)
    assert torch.equal(torch.cat([share.batch.targets for share in shares]), whole.targets)
    assert whole.conditions is not None
    support = [share.batch.conditions.support for share in shares if share.batch.conditions]
    assert torch.equal(torch.cat(support), whole.conditions.support)
    tokens = [len(share.batch.targets) for share in shares]
    assert [share.of_tokens for share in shares] == [n / len(whole.targets) for n in tokens]
    assert {share.all_tokens for share in shares} == {len(whole.targets)}
    assert sum(share.of_documents for share in shares) == pytest.approx(1)
    assert len({share.seed for share in shares}) == world * accumulate


def test_every_share_normalises_over_the_candidates_of_the_global_batch(
    features: Features,
) -> None:
    sampler = CandidateSampler(torch.ones(DOCUMENTS, dtype=torch.int64), 2, 5)
    source = StaticBatches(features, 8, 4, Seed(0, "test"), sampler)
    whole = _whole(source.draw(1, Split())).candidates
    [half] = source.draw(1, Split(rank=1, world=2))
    assert whole is not None and half.batch.candidates is not None
    assert torch.equal(half.batch.candidates.tokens, whole.tokens)
    other = _whole(source.draw(2, Split())).candidates
    assert other is not None and not torch.equal(other.tokens, whole.tokens)


def test_a_batch_too_small_for_the_workers_is_refused(features: Features) -> None:
    with pytest.raises(ConfigError, match="raise documents"):
        StaticBatches(features, 3, 4, Seed(0, "test")).draw(1, Split(world=2, accumulate=2))


def test_a_document_is_conditioned_on_its_own_cluster_without_itself(
    features: Features, embeddings: np.ndarray
) -> None:
    sampler = _sampler(features, embeddings, _settings())
    supports = set()
    for step in range(10):
        batch = _whole(sampler.draw(step, Split()))
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
    drawn = [_whole(sampler.draw(step, Split())).conditions for step in range(10)]
    share = np.mean([float((c.support == 0).float().mean()) for c in drawn if c is not None])
    assert 0.3 < share < 0.7
