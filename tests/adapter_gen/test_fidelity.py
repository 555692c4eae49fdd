"""What an export loses, measured; on random models, and on the default one with its bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.export import export_peft
from adapter_gen.fidelity import measure_export
from adapter_gen.generator import AdapterGenerator
from adapter_gen.hypernetwork import Hypernetwork
from adapter_gen.sites import discover_sites
from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import ConfigError
from cluster_router.wire.types import AdapterKey
from lm_workers.models import load_causal_lm, load_tokenizer

KEY = AdapterKey("base", "hyper", 4, 2)
TOKENS = torch.tensor([[5, 9, 2, 30, 11, 7], [1, 1, 8, 39, 0, 3]])
TEXT = "The court of appeal set the judgment aside. SELECT name FROM users; Whisk two eggs."


def test_an_export_with_the_shift_loses_nothing(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta]
) -> None:
    spec, bases, delta = parts
    weight = model.get_output_embeddings().weight
    before = model(TOKENS).logits
    files = export_peft(delta, spec, bases, "test/base", weight)
    for _ in range(2):  # PEFT leaves nothing behind that would disturb the next measurement
        found = measure_export(files, delta, spec, bases, model, TOKENS)
        assert found.tokens == 10
        assert found.largest_logit < 1e-4
        assert found.export_loss == pytest.approx(found.update_loss, abs=1e-5)
        assert found.divergence == pytest.approx(0, abs=1e-6)
        assert abs(found.update_loss - found.base_loss) > 1e-3
    assert torch.equal(model(TOKENS).logits, before)


def test_what_an_export_without_it_loses_is_the_constant_at_every_position(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta]
) -> None:
    spec, bases, delta = parts
    weight = model.get_output_embeddings().weight.detach()
    files = export_peft(delta, spec, bases, "test/base", weight, form="plain")
    found = measure_export(files, delta, spec, bases, model, TOKENS)
    if spec.depth == "paper":
        assert found.largest_logit < 1e-4
        return
    shift = bases.shift + torch.tensor(delta.shift, dtype=torch.float32)
    assert found.largest_logit == pytest.approx(float((weight @ shift).abs().max()), rel=1e-3)
    assert found.divergence > 1e-4
    assert found.export_loss != pytest.approx(found.update_loss, abs=1e-4)


def test_text_of_one_token_is_refused(
    model: PreTrainedModel, parts: tuple[UpdateSpec, SharedBases, LoraDelta]
) -> None:
    spec, bases, delta = parts
    files = export_peft(delta, spec, bases, "x", model.get_output_embeddings().weight)
    with pytest.raises(ConfigError, match="at least 2"):
        measure_export(files, delta, spec, bases, model, TOKENS[:, :1])


@pytest.fixture(scope="module")
def default(default_model: Path) -> PreTrainedModel:
    return load_causal_lm(default_model, torch.float32, "cpu")


@pytest.fixture(scope="module")
def text(default_model: Path) -> torch.Tensor:
    return torch.tensor([load_tokenizer(default_model)(TEXT).input_ids])


def test_clusters_of_the_shipped_bundle_lose_nothing(
    default: PreTrainedModel, text: torch.Tensor, bundle_path: Path
) -> None:
    bundle = Bundle.load(bundle_path, None)
    generator = AdapterGenerator(bundle)
    weight = default.get_output_embeddings().weight
    deltas = [
        generator.generate(bundle.key(bundle.snapshot, row), bundle.snapshot.conditioning_of(row))
        for row in range(len(bundle.snapshot))
    ]
    # Training leaves clusters where it is that gain nothing; these it moved most.
    moved = sorted(deltas, key=lambda delta: -float(np.abs(delta.cores).sum()))[:4]
    losses = set()
    for delta in moved:
        files = export_peft(delta, bundle.spec, bundle.bases, bundle.base_model, weight)
        found = measure_export(files, delta, bundle.spec, bundle.bases, default, text)
        assert found.largest_logit < 2e-3  # of logits around 20, in float32
        assert found.export_loss == pytest.approx(found.update_loss, abs=1e-4)
        losses.add(round(found.update_loss, 3))
    assert len(losses) == 4, "clusters should differ"


def test_a_full_depth_update_of_the_default_model_loses_nothing(
    default: PreTrainedModel,
    text: torch.Tensor,
    make_hypernetwork: Callable[..., Hypernetwork],
) -> None:
    spec = discover_sites(default, "full", rank=16)
    assert len(spec.sites) == 211
    start = init_bases(spec, seed=0)
    torch.manual_seed(0)
    bases = SharedBases(
        start.u, start.v, 0.5 * torch.randn_like(start.s0), 0.1 * torch.randn_like(start.shift)
    )
    module = make_hypernetwork(spec, 8)
    delta = module(torch.randn(1, 8), torch.tensor([40.0])).delta(0, KEY, spec)
    files = export_peft(delta, spec, bases, "test/base", default.get_output_embeddings().weight)
    found = measure_export(files, delta, spec, bases, default, text)
    assert abs(found.update_loss - found.base_loss) > 0.05
    assert found.export_loss == pytest.approx(found.update_loss, abs=1e-4)
    assert found.largest_logit < 5e-3
