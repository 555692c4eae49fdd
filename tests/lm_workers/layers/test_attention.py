"""Attention over a paged cache, against the plain one and that one against its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_cases import REFERENCE, Carried, assert_near, normal, paged
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode

from lm_workers.kv_cache import KVCache
from lm_workers.layers.native import NativeKernels
from lm_workers.layers.paged import PagedStep
from lm_workers.layers.reference import group_rows

SPANS = [(1, 1), (1, 33), (1, 70), (3, 3), (40, 40), (20, 100)]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 2, 8), (4, 4, 40)])
def test_attention(
    compiled: Carried,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
) -> None:
    step = paged(dtype, SPANS, kv_heads, size)
    query = normal(66, heads, size, dtype=dtype, seed=7)
    found = compiled.attend(query, step, 0, 0.3, window)
    assert_near(found, REFERENCE.attend(query, step, 0, 0.3, window))


@pytest.mark.parametrize("window", [None, 300])
def test_long_contexts_are_read_in_parts(
    compiled: Carried, dtype: torch.dtype, window: int | None
) -> None:
    step = paged(dtype, [(1, 3), (1, 700), (1, 257), (1, 1200)], 2, 8)
    query = normal(4, 4, 8, dtype=dtype, seed=7)
    found = compiled.attend(query, step, 0, 0.3, window)
    assert_near(found, REFERENCE.attend(query, step, 0, 0.3, window))


def test_attention_gives_the_same_bits_in_any_chunks(
    native: NativeKernels, dtype: torch.dtype
) -> None:
    whole = paged(dtype, [(90, 90)], 3, 64)
    query = normal(90, 9, 64, dtype=dtype, seed=7)
    expected = native.attend(query, whole, 0, 0.125, None)
    for start, stop in [(0, 1), (0, 40), (40, 57), (57, 90), (89, 90)]:
        chunk = replace(whole, spans=torch.tensor([[0, stop - start, stop]]))
        found = native.attend(query[start:stop], chunk, 0, 0.125, None)
        assert torch.equal(found, expected[start:stop])


def test_attention_gives_the_same_bits_in_any_company(
    native: NativeKernels, dtype: torch.dtype
) -> None:
    lengths = [9, 33, 70, 1, 600, 32, 100, 64, 65]
    step = paged(dtype, [(1, length) for length in lengths] + [(3, 40)], 3, 64)
    query = normal(12, 9, 64, dtype=dtype, seed=7)
    expected = native.attend(query, step, 0, 0.125, None)
    for row, length in enumerate(lengths):
        tables, spans = step.tables[row : row + 1], torch.tensor([[0, 1, length]])
        alone = replace(step, spans=spans, tables=tables.contiguous())
        found = native.attend(query[row : row + 1], alone, 0, 0.125, None)
        assert torch.equal(found, expected[row : row + 1])


class NotedCache(KVCache):
    """Notes how many tokens are read at a time."""

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values = cache.keys, cache.values
        self.reads: list[int] = []

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.reads.append(slots.numel())
        return super().read(layer, slots)


def test_rows_are_grouped_by_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group_rows([1, 300, 1000]) == [(3, 1024)]
    assert group_rows([2**18]) == [(1, 2**18)]
    assert group_rows([*range(1, 32), 100_000]) == [(31, 32), (1, 100_000)]
    monkeypatch.setattr("lm_workers.layers.reference._MOST_SLOTS", 128)
    assert group_rows([1, 2, 3, 32, 32, 33, 70, 129]) == [(4, 32), (2, 64), (1, 96), (1, 160)]


@pytest.mark.parametrize("window", [None, 7])
def test_a_long_context_is_read_apart_from_short_ones(
    dtype: torch.dtype, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [70, 1, 33, 500, 32, 9, 500, 2, 64, 17]
    step = paged(dtype, [(1, length) for length in lengths] + [(20, 1000)], 2, 8)
    query = normal(30, 4, 8, dtype=dtype, seed=7)
    expected = REFERENCE.attend(query, step, 0, 0.3, window)
    monkeypatch.setattr("lm_workers.layers.reference._MOST_SLOTS", 256)
    cache = NotedCache(step.cache)
    found = REFERENCE.attend(query, replace(step, cache=cache), 0, 0.3, window)
    assert torch.equal(found, expected)
    assert cache.reads == [5 * 32, 2 * 64, 96, 512, 512, 1024]


def spelled_out(
    query: torch.Tensor, step: PagedStep, scaling: float, window: int | None
) -> torch.Tensor:
    """Attention of layer 0, one token and head at a time."""
    out = query.clone()
    for (first, stop, length), row in zip(step.spans.tolist(), step.token_slots, strict=True):
        keys, values = step.cache.read(0, row)
        share = query.shape[1] // keys.shape[1]
        for token in range(first, stop):
            end = length - stop + token + 1
            seen = slice(0 if window is None else max(0, end - window), end)
            for head in range(query.shape[1]):
                key, value = keys[seen, head // share].double(), values[seen, head // share]
                weights = (scaling * (key @ query[token, head].double())).softmax(0)
                out[token, head] = (weights @ value.double()).to(query.dtype)
    return out


class Attentions(TorchFunctionMode):
    """Notes masks, and heads of queries and keys, of every attention that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[torch.Tensor, int, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.noted.append((kwargs["attn_mask"], args[0].shape[1], args[1].shape[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 40)])
def test_prompts_are_left_to_kernels_that_keep_no_scores(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lm_workers.layers.reference._ALIGNED", frozenset())  # as on a GPU
    step = paged(dtype, SPANS, kv_heads, size)
    query = normal(66, heads, size, dtype=dtype, seed=7)
    with Attentions() as attentions:
        found = REFERENCE.attend(query, step, 0, 0.3, window)
    assert_near(found, spelled_out(query, step, 0.3, window))
    for (mask, queries, keys), (*_, length) in zip(
        attentions.noted[1:], step.spans[3:].tolist(), strict=True
    ):
        # Flash attention takes a causal mask that is no tensor; the next best, heads of their own.
        assert isinstance(mask, CausalBias) == (window is None or window >= length)
        assert queries == keys == heads


@pytest.mark.parametrize("window", [None, 7])
def test_in_bfloat16_no_bit_of_a_prompt_depends_on_its_chunks(window: int | None) -> None:
    whole = paged(torch.bfloat16, [(70, 70)], 3, 64)
    query = normal(70, 9, 64, dtype=torch.bfloat16, seed=7)
    expected = REFERENCE.attend(query, whole, 0, 0.3, window)
    for cut in (8, 17, 33, 40, 64):
        first = replace(whole, spans=torch.tensor([[0, cut, cut]]), lengths=torch.tensor([cut]))
        rest = replace(whole, spans=torch.tensor([[0, 70 - cut, 70]]))
        assert torch.equal(REFERENCE.attend(query[:cut], first, 0, 0.3, window), expected[:cut])
        assert torch.equal(REFERENCE.attend(query[cut:], rest, 0, 0.3, window), expected[cut:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 64), (4, 4, 40)])
def test_a_gpu_attends_without_keeping_scores(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    step = paged(dtype, SPANS, kv_heads, size)
    query = normal(66, heads, size, dtype=dtype, seed=7)
    cache = NotedCache(step.cache)
    cache.keys, cache.values = ([one.cuda() for one in kept] for kept in (cache.keys, cache.values))
    there = replace(step, cache=cache, lengths=step.lengths.cuda(), tables=step.tables.cuda())
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        found = REFERENCE.attend(query.cuda(), there, 0, 0.3, window)
    error = (found.cpu().float() - spelled_out(query, step, 0.3, window).float()).abs().max()
    assert error <= {torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype] * query.float().abs().max()
