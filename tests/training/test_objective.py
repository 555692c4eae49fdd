"""Loss identities: what a next-token loss must and must not say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from adapter_gen.nll import head_nll
from training.data import Window
from training.features import Encoder, FeatureCache
from training.objective import CandidateSampler

VOCAB, DIM = 50, 8


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(150, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(2))


def test_a_uniform_model_loses_the_log_of_the_vocabulary(head, targets) -> None:
    losses = head_nll(torch.zeros(150, DIM), head, targets)
    torch.testing.assert_close(losses, torch.full((150,), math.log(VOCAB)))


def test_matches_cross_entropy_and_its_gradient(head, hidden, targets) -> None:
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weights = torch.rand(150)
    (head_nll(ours, head, targets) * weights).sum().backward()
    (cross_entropy(theirs @ head.T, targets, reduction="none") * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_probabilities_sum_to_one(head, hidden) -> None:
    total = sum(
        head_nll(hidden[:5], head, torch.full((5,), token)).neg().exp() for token in range(VOCAB)
    )
    torch.testing.assert_close(total, torch.ones(5))


def _mean_loss(head: torch.Tensor, encode: Encoder, windows: list[Window], folder: Path) -> float:
    """Through the cache, as every loss goes: shifted, and with padding left out."""
    features = FeatureCache(folder, "a test", encode, batch=4).features(windows)
    hidden = torch.cat([features.hidden(i) for i in range(len(features))])
    targets = torch.cat([features.targets(i) for i in range(len(features))])
    return float(head_nll(hidden, head.bfloat16(), targets).mean())


def _windows(*lengths: int) -> list[Window]:
    """Texts that never hold the same token twice in a row."""
    return [Window(np.arange(length, dtype=np.int32) % 20, 2, "d", 1) for length in lengths]


def test_copying_the_current_token_scores_badly(tmp_path: Path) -> None:
    def copies(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 30.0 * one_hot(tokens, 20).float()

    def foresees(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return 30.0 * one_hot((tokens + 1) % 20, 20).float()

    assert _mean_loss(torch.eye(20), copies, _windows(12, 15), tmp_path / "a") > 25
    assert _mean_loss(torch.eye(20), foresees, _windows(12, 15), tmp_path / "b") < 1e-3


def test_padding_is_not_scored(tmp_path: Path) -> None:
    def encode(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Perfect on text; on padding, which a wrong cut would score, as wrong as can be."""
        right = 30.0 * one_hot((tokens + 1) % 20, 20).float()
        return torch.where(mask[..., None].bool(), right, -right)

    assert _mean_loss(torch.eye(20), encode, _windows(5, 40, 9), tmp_path) < 1e-3


def test_candidates_hold_every_target_and_stand_for_the_whole_vocabulary(targets) -> None:
    counts = torch.bincount(targets, minlength=500)
    drawn = CandidateSampler(counts, always=10, sampled=40).draw(targets, 0)
    assert set(targets.tolist()) <= set(drawn.tokens.tolist())
    assert float(drawn.offset.exp().sum()) == pytest.approx(500, rel=1e-5)


def test_sampled_loss_approaches_the_exact_one() -> None:
    random = torch.Generator().manual_seed(0)
    head = 0.5 * torch.randn(2000, 16, generator=random)
    hidden = torch.randn(64, 16, generator=random)
    targets = torch.randint(2000, (64,), generator=random)
    sampler = CandidateSampler(torch.bincount(targets, minlength=2000), 200, 600)
    sampled = [sampler.draw(targets, seed).nll(hidden, head, targets).mean() for seed in range(20)]
    exact = head_nll(hidden, head, targets).mean()
    assert float(torch.stack(sampled).mean()) == pytest.approx(float(exact), abs=0.05)


def test_candidates_may_be_the_whole_vocabulary(head, hidden, targets) -> None:
    everything = CandidateSampler(torch.ones(VOCAB, dtype=torch.int64), VOCAB, 5).draw(targets, 0)
    torch.testing.assert_close(
        everything.nll(hidden, head, targets), head_nll(hidden, head, targets)
    )
