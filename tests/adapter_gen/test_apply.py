from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from adapter_gen.apply import (
    adapted,
    adapted_linear,
    apply_head,
    apply_paper,
    init_bases,
)
from adapter_gen.hypernetwork import Generated, Hypernetwork
from adapter_gen.sites import discover_sites
from adapter_gen.update import HEAD, Depth, SharedBases, Site, UpdateSpec
from cluster_router.wire.errors import ConfigError

SPEC = UpdateSpec("head", 3, 8, (Site(HEAD, 8, 8),))
TOKENS = torch.tensor([[5, 9, 2, 30], [1, 1, 8, 39], [7, 0, 3, 3]])


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers())
def test_adapted_linear_equals_the_dense_weight(
    rows: int, inputs: int, outputs: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed % 2**31)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    u, v, core = torch.randn(outputs, rank), torch.randn(rank, inputs), torch.randn(rank, rank)
    expected = x @ (weight + u @ core @ v).T
    got = adapted_linear(x, x @ weight.T, u, v, core)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [None, 5])
def test_one_core_per_row_equals_row_by_row(length: int | None) -> None:
    x = torch.randn(4, 6) if length is None else torch.randn(4, length, 6)
    u, v, cores = torch.randn(7, 3), torch.randn(3, 6), torch.randn(4, 3, 3)
    y = torch.zeros(*x.shape[:-1], 7)
    got = adapted_linear(x, y, u, v, cores)
    for row in range(4):
        torch.testing.assert_close(got[row], x[row] @ (u @ cores[row] @ v).T)


@pytest.mark.parametrize("length", [None, 5])
def test_apply_head_is_its_formula(
    length: int | None, make_bases: Callable[[UpdateSpec], SharedBases]
) -> None:
    bases = make_bases(SPEC)
    h = torch.randn(4, 8) if length is None else torch.randn(4, length, 8)
    cores, shifts = torch.randn(4, 3, 3), torch.randn(4, 8)
    got = apply_head(h, bases, cores, shifts)
    static = apply_head(h, bases)
    for row in range(4):
        update = bases.u[0] @ (bases.s0[0] + cores[row]) @ bases.v[0]
        expected = h[row] + bases.shift + shifts[row] + h[row] @ update.T
        torch.testing.assert_close(got[row], expected)
        torch.testing.assert_close(apply_head(h[row], bases, cores[row], shifts[row]), expected)
        shared = bases.u[0] @ bases.s0[0] @ bases.v[0]
        torch.testing.assert_close(static[row], h[row] + bases.shift + h[row] @ shared.T)


def test_apply_paper_scales_by_alpha_over_rank() -> None:
    h, a, b = torch.randn(2, 5, 8), torch.randn(2, 4, 8), torch.randn(2, 11, 4)
    logits = torch.randn(2, 5, 11)
    got = apply_paper(h, logits, a, b, alpha=6.0)
    for row in range(2):
        expected = logits[row] + 1.5 * h[row] @ (b[row] @ a[row]).T
        torch.testing.assert_close(got[row], expected)


def test_results_keep_the_models_dtype(make_bases: Callable[[UpdateSpec], SharedBases]) -> None:
    h = torch.randn(4, 8, dtype=torch.bfloat16)
    assert apply_head(h, make_bases(SPEC)).dtype == torch.bfloat16


def test_init_bases_is_orthonormal_seeded_and_changes_nothing(spec: UpdateSpec) -> None:
    bases = init_bases(spec, seed=3)
    for u, v in zip(bases.u, bases.v, strict=True):
        torch.testing.assert_close(u.T @ u, torch.eye(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(v @ v.T, torch.eye(3), atol=1e-5, rtol=0)
    assert all(map(torch.equal, bases.u, init_bases(spec, seed=3).u))
    assert spec.depth == "paper" or not torch.equal(bases.u[0], init_bases(spec, seed=4).u[0])
    assert not bases.s0.any()
    assert not bases.shift.any()


def test_init_bases_refuses_a_rank_beyond_the_layer() -> None:
    with pytest.raises(ConfigError, match="smallest layer size 8"):
        init_bases(UpdateSpec("head", 9, 8, (Site(HEAD, 8, 8),)), seed=0)


def test_full_depth_finds_every_linear_of_the_blocks(model: PreTrainedModel) -> None:
    spec = discover_sites(model, "full", rank=3)
    sizes = {site.name: (site.in_features, site.out_features) for site in spec.sites}
    if model.config.model_type == "gpt2":
        assert len(sizes) == 4 * 2 + 1
        assert sizes["transformer.h.1.attn.c_attn"] == (16, 48)
        assert sizes["transformer.h.0.mlp.c_proj"] == (64, 16)
    else:
        assert len(sizes) == 7 * 2 + 1
        assert sizes["model.layers.1.self_attn.k_proj"] == (16, 8)
        assert sizes["model.layers.0.mlp.down_proj"] == (24, 16)
    assert spec.sites[-1] == Site(HEAD, 16, 16)
    assert discover_sites(model, "head", 3).sites == (Site(HEAD, 16, 16),)
    assert discover_sites(model, "paper", 3).sites == (Site("lm_head", 16, 40),)


def test_adapted_model_equals_a_model_with_merged_weights(
    model: PreTrainedModel, make_bases: Callable[[UpdateSpec], SharedBases]
) -> None:
    spec = discover_sites(model, "full", rank=3)
    bases = make_bases(spec)
    bases = SharedBases(bases.u, bases.v, bases.s0, torch.zeros(16))
    cores = 0.3 * torch.randn(1, len(spec.sites), 3, 3)
    generated = Generated(cores=cores, shift=torch.zeros(1, 16))
    with torch.no_grad(), adapted(model, spec, bases, generated):
        expected = model(TOKENS).logits
    with torch.no_grad():
        for index, site in enumerate(spec.sites[:-1]):
            dense = bases.u[index] @ (bases.s0[index] + cores[0, index]) @ bases.v[index]
            module = model.get_submodule(site.name)
            module.weight += dense if isinstance(module, torch.nn.Linear) else dense.T
        hidden = model.base_model(TOKENS).last_hidden_state
        hidden = apply_head(hidden, bases, cores[0, -1])
        merged = hidden @ model.get_output_embeddings().weight.T
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_of_updates_equals_one_by_one(
    model: PreTrainedModel,
    depth: Depth,
    make_bases: Callable[[UpdateSpec], SharedBases],
    make_hypernetwork: Callable[..., Hypernetwork],
) -> None:
    spec = discover_sites(model, depth, rank=3)
    bases, module = make_bases(spec), make_hypernetwork(spec, 8)
    vector, support = torch.randn(3, 8), torch.tensor([5.0, 50.0, 500.0])
    with torch.no_grad(), adapted(model, spec, bases, module(vector, support)):
        together = model(TOKENS).logits
    for row in range(3):
        one = slice(row, row + 1)
        with torch.no_grad(), adapted(model, spec, bases, module(vector[one], support[one])):
            alone = model(TOKENS[one]).logits
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_gradients_reach_hypernetwork_and_bases(
    model: PreTrainedModel, make_hypernetwork: Callable[..., Hypernetwork]
) -> None:
    spec = discover_sites(model, "full", rank=3)
    bases, module = init_bases(spec, seed=0), make_hypernetwork(spec, 8)
    for tensor in (*bases.u, *bases.v, bases.s0, bases.shift):
        tensor.requires_grad_(True)
    with adapted(model, spec, bases, module(torch.randn(3, 8), torch.ones(3))):
        model(TOKENS, labels=TOKENS).loss.backward()
    for tensor in (*bases.u, *bases.v, bases.s0, bases.shift, *module.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.any()
