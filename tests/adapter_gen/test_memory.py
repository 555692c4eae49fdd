"""The memory hypernetwork: whose cores a condition gets, and how much of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import MemoryConfig, MemoryHypernetwork
from adapter_gen.update import HEAD, Site, UpdateSpec
from cluster_router.wire.errors import ConfigError
from cluster_router.wire.snapshot import ClusterSnapshot

SPEC = UpdateSpec("full", rank=2, hidden_size=6, sites=(Site("a.linear", 6, 8), Site(HEAD, 6, 6)))
KEYS = torch.eye(3, 5)


def memory(sharpness: float = 200.0, kappa: float = 0.0) -> MemoryHypernetwork:
    """Three prototypes along three axes around a zero mean."""
    config = MemoryConfig(prototypes=3, sharpness=sharpness, kappa=kappa)
    hypernetwork = config.build(SPEC, 5)
    cores = torch.arange(3.0)[:, None, None, None] + torch.ones(3, 2, 2, 2)
    hypernetwork.remember(KEYS, cores, torch.zeros(5))
    return hypernetwork


def test_nothing_is_generated_before_anything_is_remembered() -> None:
    hypernetwork = MemoryConfig(prototypes=3).build(SPEC, 5)
    generated = hypernetwork(torch.randn(4, 5), torch.full((4,), 9.0))
    assert not generated.cores.any()
    assert not generated.shift.any()


def test_a_condition_at_a_prototype_gets_its_cores() -> None:
    generated = memory()(KEYS, torch.full((3,), 1.0))
    torch.testing.assert_close(generated.cores[:, 0, 0, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_a_condition_between_two_gets_their_mean() -> None:
    between = (KEYS[0] + KEYS[2])[None]
    generated = memory()(between, torch.ones(1))
    torch.testing.assert_close(generated.cores[0], torch.full((2, 2, 2), 2.0))


def test_the_length_of_a_condition_does_not_matter_and_the_mean_is_taken_off() -> None:
    hypernetwork = memory(sharpness=4.0)
    mean = torch.tensor([0.0, 0.0, 0.0, 0.3, -0.2])
    hypernetwork.remember(KEYS + mean, hypernetwork.cores.unflatten(1, (2, 2, 2)), mean)
    one, far = (hypernetwork.weights(mean + scale * KEYS[:1]) for scale in (1.0, 7.0))
    torch.testing.assert_close(one, far)
    torch.testing.assert_close(one, memory(sharpness=4.0).weights(KEYS[:1]))


def test_thin_evidence_and_low_strength_shrink_the_update() -> None:
    hypernetwork = memory(kappa=8.0)
    support = torch.tensor([0.0, 8.0, 24.0])
    cores = hypernetwork(KEYS[:1].expand(3, -1), support).cores[:, 0, 0, 0]
    torch.testing.assert_close(cores, torch.tensor([0.0, 0.5, 0.75]))
    hypernetwork.strength.fill_(0.5)
    halved = hypernetwork(KEYS[:1].expand(3, -1), support).cores[:, 0, 0, 0]
    torch.testing.assert_close(halved, cores / 2)


def test_it_survives_a_bundle(tmp_path: Path) -> None:
    hypernetwork = memory(sharpness=5.0, kappa=3.0)
    hypernetwork.strength.fill_(0.75)
    centroids = KEYS.numpy().astype(np.float32)
    snapshot = ClusterSnapshot(
        version=1,
        threshold=0.1,
        mean=np.zeros(5, np.float32),
        centroids=centroids,
        conditioning=centroids,
        ids=np.arange(3),
        sizes=np.full(3, 9),
        versions=np.ones(3, np.int64),
    )
    bundle = Bundle("m", "f" * 16, hypernetwork, init_bases(SPEC, 0), snapshot)
    bundle.save(tmp_path / "bundle")
    loaded = Bundle.load(tmp_path / "bundle", "f" * 16)
    conditions, support = torch.randn(4, 5), torch.full((4,), 5.0)
    torch.testing.assert_close(
        loaded.hypernetwork(conditions, support).cores, hypernetwork(conditions, support).cores
    )
    assert loaded.hypernetwork_id == bundle.hypernetwork_id


def test_the_papers_update_has_no_cores_to_remember() -> None:
    spec = UpdateSpec("paper", rank=2, hidden_size=6, sites=(Site("lm_head", 6, 9),))
    with pytest.raises(ConfigError, match="depth head or full"):
        MemoryConfig().build(spec, 5)
