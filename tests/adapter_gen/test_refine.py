"""Refinement on a small random model: what it moves, what it leaves, and when it declines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapter_gen.apply import adapted, init_bases
from adapter_gen.hypernetwork import Generated
from adapter_gen.language_model import AdaptedLM, ScoredTokens
from adapter_gen.refine import RefineConfig, Refiner
from adapter_gen.sites import discover_sites
from cluster_router.wire.errors import ConfigError, DeltaError
from lm_workers.models import load_causal_lm

CONFIG = RefineConfig(steps=12, learning_rate=0.1, batch=8, min_prompts=8)


@pytest.fixture(scope="module")
def parts(tiny_checkpoints):
    model = load_causal_lm(tiny_checkpoints["llama"], torch.float32, "cpu")
    spec = discover_sites(model, "full", 4)
    return model, spec, init_bases(spec, 0)


def prompts(seed: int, count: int = 40, vocabulary: int = 8, length: int = 24):
    """Prompts over a few tokens that follow each other in a fixed cycle."""
    random = np.random.default_rng(seed)
    starts = random.integers(0, vocabulary, count)
    return [((start + np.arange(length)) % vocabulary + 5).astype(np.int32) for start in starts]


def loss_of(model, spec, bases, generated, sequences):
    scored = ScoredTokens.of([torch.from_numpy(p.astype(np.int64)) for p in sequences], [1] * 40)
    with torch.no_grad():
        return float(AdaptedLM(model, spec).losses(scored, bases, generated).mean())


def test_losses_equal_the_model_under_the_reference_hooks(parts):
    model, spec, bases = parts
    random = torch.Generator().manual_seed(1)
    generated = Generated(
        cores=0.3 * torch.randn(3, len(spec.sites), 4, 4, generator=random),
        shift=0.1 * torch.randn(3, spec.hidden_size, generator=random),
    )
    lengths = [9, 5, 7]
    sequences = [torch.randint(0, model.config.vocab_size, (n,)) for n in lengths]
    scored = ScoredTokens.of(sequences, [1, 2, 3])
    losses = AdaptedLM(model, spec).losses(scored, bases, generated)
    expected = []
    for row, (sequence, first) in enumerate(zip(sequences, [1, 2, 3], strict=True)):
        own = Generated(cores=generated.cores[row : row + 1], shift=generated.shift[row : row + 1])
        with torch.no_grad(), adapted(model, spec, bases, own):
            logits = model(sequence[None]).logits[0, first - 1 : -1]
        expected.append(
            torch.nn.functional.cross_entropy(logits, sequence[first:], reduction="none")
        )
    torch.testing.assert_close(losses, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_refinement_lowers_the_loss_of_prompts_it_never_saw(parts):
    model, spec, bases = parts
    refined = Refiner(model, spec, bases, CONFIG).refine(prompts(0))
    unseen = prompts(1)
    before, after = (loss_of(model, spec, bases, g, unseen) for g in (None, refined.generated))
    assert refined.gain > 0
    assert refined.scale > 0
    assert after < before - 0.05


def test_few_prompts_take_few_steps_where_passes_are_bounded():
    config = RefineConfig(steps=40, batch=12, passes=1.5)
    assert [config.steps_for(count) for count in (2, 12, 48, 1000)] == [1, 2, 6, 40]
    assert RefineConfig(steps=40).steps_for(2) == 40


def test_refinement_starts_from_what_it_is_given(parts):
    model, spec, bases = parts
    refiner = Refiner(model, spec, bases, CONFIG)
    first = refiner.refine(prompts(0)).generated
    second = refiner.refine(prompts(2), first).generated
    unseen = prompts(1)
    assert loss_of(model, spec, bases, second, unseen) < loss_of(model, spec, bases, first, unseen)


def test_a_gain_that_is_not_clear_leaves_the_update_alone(parts):
    model, spec, bases = parts
    random = np.random.default_rng(0)
    noise = [random.integers(0, model.config.vocab_size, 24).astype(np.int32) for _ in range(40)]
    careful = CONFIG.model_copy(update={"margin": 10.0})
    refined = Refiner(model, spec, bases, careful).refine(noise)
    assert (refined.scale, refined.gain) == (0.0, 0.0)
    assert not refined.generated.cores.any()
    assert Refiner(model, spec, bases, careful).refine(prompts(0)).scale > 0


def test_too_few_prompts_are_not_learned_from(parts):
    model, spec, bases = parts
    refined = Refiner(model, spec, bases, CONFIG).refine(prompts(0, count=7))
    assert (refined.scale, refined.tokens) == (0.0, 0)


def test_the_model_and_the_bases_are_untouched(parts):
    model, spec, bases = parts
    before = {name: p.clone() for name, p in model.named_parameters()}
    shared = [t.clone() for t in (*bases.u, *bases.v, bases.s0, bases.shift)]
    Refiner(model, spec, bases, CONFIG).refine(prompts(0))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after = (*bases.u, *bases.v, bases.s0, bases.shift)
    assert all(torch.equal(a, b) for a, b in zip(after, shared, strict=True))


def test_a_poisoned_start_is_refused(parts):
    model, spec, bases = parts
    cores = torch.full((1, len(spec.sites), 4, 4), float("nan"))
    with pytest.raises(DeltaError, match="step 1"):
        Refiner(model, spec, bases, CONFIG).refine(prompts(0), Generated(cores=cores))


def test_the_papers_update_has_no_cores_to_refine(parts):
    model, _, _ = parts
    spec = discover_sites(model, "paper", 4)
    with pytest.raises(ConfigError, match="no cores"):
        Refiner(model, spec, init_bases(spec, 0))


@pytest.mark.parametrize(("skip", "scored"), [(0, 23), (8, 16), (100, 12)])
def test_the_beginnings_of_prompts_are_not_learned_from(parts, monkeypatch, skip, scored):
    model, spec, bases = parts
    seen = []
    losses = AdaptedLM.losses

    def watch(lm, batch, *rest):
        seen.append(batch.places.min().item())
        return losses(lm, batch, *rest)

    monkeypatch.setattr(AdaptedLM, "losses", watch)
    refined = Refiner(model, spec, bases, CONFIG.model_copy(update={"skip": skip})).refine(
        prompts(0)
    )
    assert refined.tokens == 30 * scored
    assert set(seen) == {24 - scored}
