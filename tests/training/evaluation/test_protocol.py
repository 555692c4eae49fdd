"""Identities that hold for every honest evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adapter_gen.bundle import Bundle
from training.base import FrozenBase
from training.evaluation.caches import WEIGHTS, CacheCase, CacheScorer, unigram_probabilities
from training.evaluation.evaluator import Measured
from training.evaluation.figures import GroupFigures
from training.evaluation.groups import Group
from training.evaluation.scores import Scores, Work
from training.evaluation.settings import VARIANTS, EvaluateSettings
from training.evaluation.store import Store
from training.evaluation.updates import (
    Family,
    Task,
    Update,
    blend,
    noise_like,
)


@pytest.fixture(scope="module")
def measured(
    measure: Callable[..., dict[str, Measured]],
    groups: list[Group],
    quick_settings: EvaluateSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Measured]:
    """Every variant."""
    return measure(groups, quick_settings, tmp_path_factory.mktemp("store"))


def test_every_variant_is_measured_where_it_can_be(measured: dict[str, Measured]) -> None:
    assert set(VARIANTS) - set(measured["unseen"].sums) == {"budget_static"}
    assert "refined" not in measured["seen"].sums
    for group in measured.values():
        for name, sums in group.sums.items():
            assert np.isfinite(sums).any(), name
            assert (sums[np.isfinite(sums)] > 0).all(), name


def test_expensive_variants_get_as_many_documents_of_each_domain(
    measured: dict[str, Measured],
) -> None:
    group = measured["unseen"]
    for name in ("oracle", "in_context", "refined_own", "neural_cache"):
        chosen = [group.windows[i].domain for i in np.flatnonzero(np.isfinite(group.sums[name]))]
        assert sorted(chosen) == ["numbers"] * 2 + ["secret"] * 2


def test_updates_that_differ_give_losses_that_differ(measured: dict[str, Measured]) -> None:
    sums = measured["unseen"].sums
    for name in ("base", "shuffled", "mean", "noise", "own", "merge", "stream"):
        assert not np.array_equal(sums[name], sums["hyper"]), name
    for name in ("static", "stream", "refined_shuffled", "refined_mean", "refined_random"):
        assert not np.array_equal(sums[name], sums["refined"]), name


def test_a_document_of_no_cluster_gains_exactly_nothing(measured: dict[str, Measured]) -> None:
    found = 0
    for group in measured.values():
        for index, facts in enumerate(group.facts):
            gain = group.sums["static"][index] - group.sums["hyper"][index]
            assert (gain == 0) == (not facts.assigned)
            found += not facts.assigned
    assert found, "the threshold should leave some out"


def test_a_variant_equal_to_another_has_zero_gain(measured: dict[str, Measured]) -> None:
    group = measured["unseen"]
    twin = dataclasses.replace(group, sums=group.sums | {"hyper": group.sums["static"].copy()})
    report = GroupFigures(twin, 100, 0).report()
    assert report["mean"]["gains"]["net"] == [0, 0, 0]
    assert "hyper" not in report["shares"].get("lost_when_shuffled", {})


def test_figures_are_of_the_documents_where_both_were_measured(
    measured: dict[str, Measured],
) -> None:
    group = measured["unseen"]
    report = GroupFigures(group, 100, 0).report()
    assert "oracle" not in report["mean"]["nats_per_token"]
    part, mean = report["part"], report["mean"]
    assert part["documents"] == 4
    nats = part["nats_per_token"]
    expected = nats["static"] - nats["oracle"]
    assert mean["over_static"]["oracle"][0] == pytest.approx(expected, abs=2e-5)


def test_a_uniform_model_loses_ln_of_the_vocabulary(
    base: FrozenBase, random_bundle: Bundle, groups: list[Group], tmp_path: Path
) -> None:
    class Uniform(FrozenBase):
        @property
        def model(self) -> torch.nn.Module:
            return self.silent

    uniform = Uniform(base.path)
    silent = FrozenBase(base.path).model
    with torch.no_grad():
        silent.get_output_embeddings().weight.zero_()
    object.__setattr__(uniform, "silent", silent)
    family = Family.unadapted(random_bundle.spec)
    tasks = [Task(window, Update.static(family)) for window in groups[0].windows]
    scores = Scores(uniform, Store(tmp_path), 4, Work())
    expected = [task.window.scored * math.log(len(base.head)) for task in tasks]
    assert scores.nats(tasks) == pytest.approx(expected, rel=1e-5)


def test_what_shares_a_pass_hardly_matters(
    base: FrozenBase, random_bundle: Bundle, groups: list[Group], tmp_path: Path
) -> None:
    family = Family.of(random_bundle.spec, random_bundle.bases)
    tasks = [Task(window, Update.static(family)) for window in groups[1].windows]
    alone = Scores(base, Store(tmp_path / "1"), 1, Work()).nats(tasks)
    together = Scores(base, Store(tmp_path / "8"), 8, Work()).nats(tasks)
    assert together == pytest.approx(alone, rel=5e-3)


def test_a_cache_of_weight_zero_is_the_static_update(
    base: FrozenBase, random_bundle: Bundle, groups: list[Group], tmp_path: Path
) -> None:
    family = Family.of(random_bundle.spec, random_bundle.bases)
    scores = Scores(base, Store(tmp_path), 1, Work())
    window, *support = groups[1].windows[:3]
    grid = CacheScorer(scores, family).grid("unigram", CacheCase(window, support))
    assert len(grid) == len(WEIGHTS)
    static = scores.nats([Task(window, Update.static(family))])
    assert grid[0] == pytest.approx(static[0], rel=1e-3)


def test_a_cache_never_counts_the_token_it_predicts(groups: list[Group]) -> None:
    window = groups[1].windows[0]
    tokens = np.arange(len(window.tokens), dtype=np.int32)
    fresh = dataclasses.replace(window, tokens=tokens)
    assert not unigram_probabilities(CacheCase(fresh, [])).any()
    repeated = dataclasses.replace(window, tokens=np.ones_like(tokens))
    assert (unigram_probabilities(CacheCase(repeated, [])) == 1).all()


def test_noise_has_the_norm_of_what_it_replaces(
    random_bundle: Bundle,
) -> None:
    snapshot = random_bundle.snapshot
    vector = torch.from_numpy(snapshot.conditioning[:1].copy())
    update = random_bundle.hypernetwork(vector, torch.tensor([10.0]))
    noise = noise_like(update, 3)
    assert noise.cores.shape == update.cores.shape
    assert torch.allclose(noise.cores.norm(dim=(2, 3)), update.cores.norm(dim=(2, 3)), rtol=1e-4)
    assert torch.allclose(noise.shift.norm(), update.shift.norm(), rtol=1e-4)
    assert not torch.allclose(noise.cores, update.cores, rtol=0.1)
    half = blend([0.5, 0.5], [update, update])
    assert torch.allclose(half.cores, update.cores)
