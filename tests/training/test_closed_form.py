"""The second-order model of the loss, and the shift fitted to it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.hypernetwork import CoreConfig, CoreHypernetwork
from adapter_gen.update import HEAD, Site, UpdateSpec
from training.clusters import Conditions
from training.curvature import Curvature
from training.data import Window
from training.features import Features
from training.least_squares import Groups, solve_shift
from training.modules import AdaptedHead, Batch, HeadBases

DIM, VOCAB, DOCUMENTS, SCORED = 6, 20, 12, 30
SPEC = UpdateSpec("head", 2, DIM, (Site(HEAD, DIM, DIM),))


@pytest.fixture
def module() -> AdaptedHead:
    """A static update that is not zero, before a random head."""
    random = torch.Generator().manual_seed(0)
    bases = init_bases(SPEC, 0)
    bases = dataclasses.replace(bases, shift=0.3 * torch.randn(DIM, generator=random))
    return AdaptedHead(HeadBases(bases), None, torch.randn(VOCAB, DIM, generator=random))


@pytest.fixture
def features() -> Features:
    """Documents of two kinds: even ones use the first half of the vocabulary, odd ones the rest."""
    random = np.random.default_rng(0)
    windows = []
    for document in range(DOCUMENTS):
        tokens = random.integers(0, VOCAB // 2, SCORED + 1) + (document % 2) * VOCAB // 2
        windows.append(Window(tokens.astype(np.int32), 1, "ab"[document % 2], 1))
    hidden = torch.randn(DOCUMENTS, SCORED, DIM, generator=torch.Generator().manual_seed(1))
    return Features(windows, list(hidden))


@pytest.fixture
def curvature(module: AdaptedHead, features: Features) -> Curvature:
    return Curvature.measure(module, features, None, rows=10**6)


def _loss(module: AdaptedHead, features: Features, index: int, shift: torch.Tensor) -> torch.Tensor:
    targets = features.targets(index)
    batch = Batch(features.hidden(index), targets, torch.zeros_like(targets))
    return module.nll(module.adapt(batch.hidden) + shift, batch).mean().detach()


def test_the_gradient_is_that_of_the_loss_by_a_shift(
    module: AdaptedHead, features: Features, curvature: Curvature
) -> None:
    for axis in range(DIM):
        step = 1e-2 * torch.eye(DIM)[axis]
        rise = _loss(module, features, 4, step) - _loss(module, features, 4, -step)
        assert float(rise) / 2e-2 == pytest.approx(float(curvature.gradients[4, axis]), abs=2e-3)


def test_the_second_derivative_is_that_of_the_normaliser(
    module: AdaptedHead, features: Features, curvature: Curvature
) -> None:
    adapted = module.adapt(torch.cat([features.hidden(i) for i in range(DOCUMENTS)])).detach()

    def normaliser(shift: torch.Tensor) -> torch.Tensor:
        return ((adapted + shift) @ module.weight.T).logsumexp(dim=1).mean()

    expected = torch.autograd.functional.hessian(normaliser, torch.zeros(DIM))
    torch.testing.assert_close(curvature.hessian, expected, atol=1e-4, rtol=1e-4)


def test_a_group_is_the_token_weighted_mean_of_its_documents() -> None:
    gradients = torch.tensor([[1.0, 0.0], [4.0, 3.0], [9.0, 9.0]])
    curvature = Curvature(gradients, torch.tensor([10.0, 20.0, 5.0]), torch.eye(2))
    torch.testing.assert_close(
        curvature.group_gradient(torch.tensor([0, 1])), torch.tensor([3.0, 2.0])
    )


@pytest.fixture
def hypernetwork() -> CoreHypernetwork:
    torch.manual_seed(0)
    return CoreConfig(width=16, kappa=2.0).build(SPEC, conditioning_dim=4)


@pytest.fixture
def groups(curvature: Curvature) -> Groups:
    """Twelve clusters, one a document, told apart by their conditions."""
    random = torch.Generator().manual_seed(2)
    kinds = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).repeat(DOCUMENTS // 2, 1)
    vectors = kinds + 0.05 * torch.randn(DOCUMENTS, 4, generator=random)
    support = torch.arange(1.0, DOCUMENTS + 1)
    return Groups(Conditions(vectors, support), curvature.gradients, support / support.sum())


def _quadratic(hypernetwork: CoreHypernetwork, groups: Groups, hessian: torch.Tensor) -> float:
    shift = hypernetwork(groups.conditions.vectors, groups.conditions.support).shift
    linear = (groups.gradients * shift).sum(1)
    return (groups.weights @ (linear + ((shift @ hessian) * shift).sum(1) / 2)).item()


def test_the_fit_is_the_minimum_of_the_second_order_loss(
    hypernetwork: CoreHypernetwork, groups: Groups, curvature: Curvature
) -> None:
    solved = solve_shift(hypernetwork, groups, torch.linalg.inv(curvature.hessian), ridge=1e-6)
    weight = hypernetwork.shift.weight.data
    weight.copy_(solved)
    best = _quadratic(hypernetwork, groups, curvature.hessian)
    assert best < 0, "a zero shift gives zero"
    random = torch.Generator().manual_seed(3)
    for _ in range(20):
        weight.copy_(solved + 0.05 * torch.randn(solved.shape, generator=random))
        assert _quadratic(hypernetwork, groups, curvature.hessian) > best


def test_more_ridge_means_a_smaller_shift(
    hypernetwork: CoreHypernetwork, groups: Groups, curvature: Curvature
) -> None:
    inverse = curvature.inverse(0.5)
    norms = [float(solve_shift(hypernetwork, groups, inverse, r).norm()) for r in (0.01, 1.0, 100)]
    assert norms[0] > norms[1] > norms[2] > 0


def test_the_fit_lowers_the_real_loss_of_each_kind(
    module: AdaptedHead,
    features: Features,
    hypernetwork: CoreHypernetwork,
    groups: Groups,
    curvature: Curvature,
) -> None:
    solved = solve_shift(hypernetwork, groups, curvature.inverse(0.5), ridge=0.1)
    hypernetwork.shift.weight.data.copy_(0.5 * solved)
    shift = hypernetwork(groups.conditions.vectors, groups.conditions.support).shift.detach()
    before = [_loss(module, features, i, torch.zeros(DIM)) for i in range(DOCUMENTS)]
    own = [_loss(module, features, i, shift[i]) for i in range(DOCUMENTS)]
    other = [_loss(module, features, i, shift[(i + 1) % DOCUMENTS]) for i in range(DOCUMENTS)]
    assert sum(own) < sum(before) < sum(other)
