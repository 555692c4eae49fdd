"""Weight layouts, groups of linear layers, and the choice between implementations."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapter_gen.apply import init_bases
from adapter_gen.update import HEAD, LoraDelta, Site, UpdateSpec
from cluster_router.wire.errors import ConfigError
from cluster_router.wire.types import AdapterKey
from lm_workers.adapters import AdapterBank, RowSlots
from lm_workers.layers import compiler
from lm_workers.layers.choose import choose_kernels, choose_layout
from lm_workers.layers.kernels import LateUpdate
from lm_workers.layers.linear import LinearGroup, PackedProduct, PlainProduct, Product, RowUpdate
from lm_workers.layers.panels import (
    PairProduct,
    PanelProduct,
    TileProduct,
    is_bfloat16,
    load_floats,
    load_tiles,
)
from lm_workers.layers.reference import ReferenceKernels

pairs = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="no AVX-512 BF16 here")
tiles = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="no AMX here")
packs = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 in oneDNN here"
)


@packs
@pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(), reason="oneDNN's sums depend on the number of rows here"
)
@torch.inference_mode()
@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (32, 64)])
def test_packed_weights_give_the_same_bits_for_any_number_of_rows(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape[1], shape[0]).bfloat16()
    bias = torch.randn(shape[1]).bfloat16()
    x = torch.randn(70, shape[0]).bfloat16()
    plain, packed = PlainProduct(weight, bias), PackedProduct(weight, bias)
    expected = packed(x)
    assert torch.equal(expected, plain(x))
    for rows in (2, 3, 16, 33):
        assert torch.equal(packed(x[:rows]), expected[:rows])


@torch.inference_mode()
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (33, 65), (8, 5)])
def test_panels_give_the_numbers_of_the_plain_layout_and_the_same_bits_for_any_number_of_rows(
    cxx: str, shape: tuple[int, int], stored: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape[1], shape[0]).to(stored).float(), torch.randn(shape[1])
    x = torch.randn(140, shape[0] + 3)[:, : shape[0]]
    assert is_bfloat16(weight) == (stored == torch.bfloat16)
    expected = PlainProduct(weight, bias)(x)
    panels = PanelProduct(weight, bias)
    found = panels(x)
    # Sums run in another order: of the largest number, as for the other kernels.
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
    assert not torch.equal(found, PanelProduct(weight, None)(x))
    for rows in (1, 2, 3, 4, 5, 6, 7, 16, 33):
        assert torch.equal(panels(x[:rows]), found[:rows])
        assert torch.equal(panels(x[-rows:]), found[-rows:])
    assert torch.equal(PanelProduct(weight.T.contiguous().T, bias)(x), found)
    some = torch.randint(len(weight), (50, 2))[:, 0]
    assert torch.equal(panels.rows(some), weight[some])


@torch.inference_mode()
@pytest.mark.parametrize(
    "layout", [pytest.param(PairProduct, marks=pairs), pytest.param(TileProduct, marks=tiles)]
)
@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (33, 65), (8, 5)])
def test_pairs_and_tiles_give_the_plain_numbers_and_the_same_bits_for_any_number_of_rows(
    cxx: str, shape: tuple[int, int], layout: type[Product]
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape[1], shape[0]).bfloat16(), torch.randn(shape[1]).bfloat16()
    x = torch.randn(600, shape[0] + 3).bfloat16()[:, : shape[0]]
    expected = x.double() @ weight.double().T + bias.double()
    product = layout(weight, bias)
    found = product(x)
    assert found.dtype == torch.bfloat16
    # Of each number half a unit in the last place, and of the largest one what float32 sums lose.
    error = (found.double() - expected).abs() - 2**-8 * expected.abs()
    assert error.max() <= 5e-6 * expected.abs().max()
    assert not torch.equal(found, layout(weight, None)(x))
    for rows in (*range(1, 35), 47, 48, 49, 500):
        assert torch.equal(product(x[:rows]), found[:rows])
        assert torch.equal(product(x[-rows:]), found[-rows:])
    assert torch.equal(layout(weight.T.contiguous().T, bias)(x), found)
    assert product(x[:0]).shape == (0, len(weight))
    some = torch.randint(len(weight), (50, 2))[:, 0]
    assert product.rows is not None and torch.equal(product.rows(some), weight[some])


@tiles
@torch.inference_mode()
def test_tiles_and_onednn_take_turns(cxx: str) -> None:
    weight = torch.randn(96, 64).bfloat16()
    ours, theirs = TileProduct(weight, None), PlainProduct(weight, None)
    for rows in (1, 40, 5, 64):
        x = torch.randn(rows, 64).bfloat16()
        found, expected = ours(x).float(), theirs(x).float()
        assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


@packs
def test_where_the_cpu_has_no_pairs_or_tiles_onednn_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise compiler.CompileError("no such instruction")

    monkeypatch.setattr("lm_workers.layers.choose.load_pairs", refuse)
    monkeypatch.setattr("lm_workers.layers.choose.load_tiles", refuse)
    assert choose_layout("auto", torch.bfloat16, "cpu") is PackedProduct


@tiles
def test_auto_multiplies_tiles_where_the_cpu_does(cxx: str) -> None:
    assert choose_layout("auto", torch.bfloat16, "cpu") is TileProduct


@tiles
def test_a_system_that_keeps_tiles_to_itself_is_told_of(
    cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = compiler.compile_library("product_amx.cpp", "BFLOAT16")
    monkeypatch.setattr(library, "request", lambda: -1)
    monkeypatch.setattr("lm_workers.layers.panels.compile_library", lambda *_: library)
    with pytest.raises(compiler.CompileError, match="does not let this process"):
        load_tiles.__wrapped__()


class LatestKernels(ReferenceKernels):
    """Leave every update."""

    late_rank = 64


@torch.inference_mode()
@pytest.mark.parametrize("kernels", [ReferenceKernels(), LatestKernels()])
@pytest.mark.parametrize("layout", [PlainProduct, PanelProduct])
def test_a_group_adds_its_update_or_leaves_it(
    cxx: str, layout: type[Product], kernels: ReferenceKernels
) -> None:
    torch.manual_seed(0)
    members = [nn.Linear(16, 8), nn.Linear(16, 24, bias=False), nn.Linear(16, 8)]
    sites = (Site("a", 16, 8), Site("c", 16, 8), Site(HEAD, 16, 16))
    spec = UpdateSpec("full", 4, 16, sites)
    bases = init_bases(spec, seed=0)
    bank = AdapterBank(spec, bases, 2, torch.float32, "cpu")
    cores = np.random.default_rng(0).standard_normal((3, 4, 4)).astype(np.float16)
    delta = LoraDelta(AdapterKey("n", "b", 1, 0), cores=cores, shift=np.zeros(16, np.float16))
    rows = RowSlots()
    rows.tokens = torch.tensor([0, bank.acquire(delta), 0])
    update = RowUpdate(bank, rows, kernels, bank.targets([(0, 0, 8), (1, 32, 8)]))
    group, x = LinearGroup(members, layout, update), torch.randn(3, 16)
    plain = torch.cat([member(x) for member in members], -1)
    expected = plain.clone()
    for site, first in ((0, 0), (1, 32)):
        core = torch.from_numpy(cores[site]).float()
        expected[1, first : first + 8] += bases.u[site] @ core @ bases.v[site] @ x[1]
    torch.testing.assert_close(group(x[None]), expected[None])
    y, late = group.leave(x)
    assert (late is None) == (kernels.late_rank == 0)
    if isinstance(late, LateUpdate):
        torch.testing.assert_close(y, plain)
        kernels.update(y, late)
    torch.testing.assert_close(y, expected)
    rows.tokens = None
    torch.testing.assert_close(group(x), plain)
    assert group.leave(x)[1] is None


@torch.inference_mode()
def test_a_group_gives_what_its_members_give() -> None:
    torch.manual_seed(0)
    members = [nn.Linear(16, 8), nn.Linear(16, 24, bias=False), Conv1D(4, 16)]
    group = LinearGroup(members, PlainProduct, None)
    x = torch.randn(1, 5, 16)
    expected = torch.cat([member(x) for member in members], -1)
    torch.testing.assert_close(group(x), expected)
    torch.testing.assert_close(group(x[0]), expected[0])


def test_a_layout_or_kernel_that_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="packed"):
        choose_layout("packed", torch.float16, "cpu")
    with pytest.raises(ConfigError, match="native"):
        choose_kernels("native", torch.float16, "cpu")
    assert choose_layout("plain", torch.bfloat16, "cpu") is PlainProduct
    assert choose_layout("auto", torch.float32, "cuda") is PlainProduct


def test_without_a_compiler_the_reference_runs_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.compile_library.cache_clear()
    load_floats.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_kernels("auto", torch.float32, "cpu"), ReferenceKernels)
        assert choose_layout("auto", torch.float32, "cpu") is PlainProduct
    assert "no-such-compiler" in caplog.text
    compiler.compile_library.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_where_triton_cannot_run_the_reference_does_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = choose_kernels("auto", torch.bfloat16, "cuda")
    assert type(found) is ReferenceKernels
    assert "without Triton's kernels" in caplog.text
    with pytest.raises(ConfigError, match="kernels: native needs Triton"):
        choose_kernels("native", torch.bfloat16, "cuda")


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text(
        "#!/bin/sh\nif [ $1 = --version ]; then exit; fi\necho out of ink >&2\nexit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path))
    compiler.compile_library.cache_clear()
    with pytest.raises(compiler.CompileError, match="out of ink"):
        compiler.compile_library("native.cpp", "FLOAT32")
    assert (tmp_path / "kernels").is_dir(), "where everything else is kept"
    compiler.compile_library.cache_clear()
