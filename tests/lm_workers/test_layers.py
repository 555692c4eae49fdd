"""Layouts and kernels against their plain implementations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig

from lm_workers.adapters import UpdateTargets
from lm_workers.kv_cache import KVCache
from lm_workers.layers.kernels import HeadNorms
from lm_workers.layers.native import NATIVE_DTYPES, NativeKernels
from lm_workers.layers.paged import PagedStep
from lm_workers.layers.reference import ReferenceKernels, group_rows

REFERENCE = ReferenceKernels()
BLOCK = 4
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Of the largest number: bfloat16 keeps 8 bits."""


@pytest.fixture(params=sorted(NATIVE_DTYPES, key=str), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def native(cxx: str, dtype: torch.dtype) -> NativeKernels:
    return NativeKernels(dtype, threads=2)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    error = (found.float() - expected.float()).abs().max()
    assert error <= TOLERANCE[expected.dtype] * expected.float().abs().max()


def paged(dtype: torch.dtype, spans: list[tuple[int, int]], heads: int, size: int) -> PagedStep:
    """A step of spans (new tokens, tokens in all), over scattered blocks of a filled cache."""
    counts = [-(-length // BLOCK) for _, length in spans]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)) + 1
    tables = torch.zeros(len(spans), max(counts), dtype=torch.int64)
    rows, write, row = [], [], 0
    for number, (count, (new, length)) in enumerate(zip(counts, spans, strict=True)):
        tables[number, :count], order = order[:count], order[count:]
        places = torch.arange(length - new, length)
        write.append(tables[number, places // BLOCK] * BLOCK + places % BLOCK)
        rows.append([row, row + new, length])
        row += new
    config = LlamaConfig(
        hidden_size=heads * size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=size,
    )
    cache = KVCache(config, (1 + sum(counts)) * BLOCK, dtype, "cpu")
    for layer in range(2):
        cache.keys[layer].copy_(normal(*cache.keys[layer].shape, dtype=dtype, seed=layer))
        cache.values[layer].copy_(normal(*cache.values[layer].shape, dtype=dtype, seed=9 + layer))
    spans = torch.tensor(rows)
    return PagedStep(cache, BLOCK, torch.cat(write), spans, spans[:, 2], tables)


@pytest.mark.parametrize("size", [8, 64, 576, 1000])
def test_norms(native: NativeKernels, dtype: torch.dtype, size: int) -> None:
    x, weight = normal(5, size, dtype=dtype), normal(size, dtype=dtype, seed=1)
    assert_near(native.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    wide = normal(5, size + 24, dtype=dtype, seed=2)[:, :size]
    sums = [x.clone(), x.clone()]
    found = native.add_rms_norm(sums[0], wide, weight, 1e-5)
    assert_near(found, REFERENCE.add_rms_norm(sums[1], wide, weight, 1e-5))
    assert torch.equal(*sums)


@pytest.mark.parametrize("size", [10, 1536])
def test_silu_mul(native: NativeKernels, dtype: torch.dtype, size: int) -> None:
    x = normal(7, 2 * size + 16, dtype=dtype, scale=20)[:, : 2 * size]
    assert_near(native.silu_mul(x), REFERENCE.silu_mul(x))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 2, 8), (6, 6, 40)])
def test_rotate_and_store(
    native: NativeKernels, dtype: torch.dtype, heads: int, kv_heads: int, size: int, normed: bool
) -> None:
    step = paged(dtype, [(1, 9), (5, 12)], kv_heads, size)
    other = replace(step, cache=paged(dtype, [(1, 9), (5, 12)], kv_heads, size).cache)
    qkv = normal(6, (heads + 2 * kv_heads) * size + 8, dtype=dtype)[:, :-8]
    angles = normal(6, size, dtype=torch.float32, seed=4)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = normal(size, dtype=dtype, seed=5), normal(size, dtype=dtype, seed=6)
    norms = HeadNorms(*weights, 1e-6) if normed else None
    expected = REFERENCE.rotate_and_store(qkv.clone(), rotary, norms, other, 1)
    assert_near(native.rotate_and_store(qkv, rotary, norms, step, 1), expected)
    for found, wanted in zip(
        [*step.cache.keys, *step.cache.values],
        [*other.cache.keys, *other.cache.values],
        strict=True,
    ):
        assert_near(found, wanted)


SPANS = [(1, 1), (1, 33), (1, 70), (3, 3), (40, 40), (20, 100)]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 2, 8), (4, 4, 40)])
def test_attention(
    native: NativeKernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    window: int | None,
) -> None:
    step = paged(dtype, SPANS, kv_heads, size)
    query = normal(66, heads, size, dtype=dtype, seed=7)
    found = native.attend(query, step, 0, 0.3, window)
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


@pytest.mark.parametrize("rank", [4, 8, 32])
def test_update(native: NativeKernels, dtype: torch.dtype, rank: int) -> None:
    targets = UpdateTargets(
        torch.tensor([[2, 0, 40], [0, 56, 24]]),
        normal(rank, 64, dtype=dtype, seed=1),
        normal(2 * rank, 72, dtype=dtype, scale=0.1),
    )
    cores = normal(4, 3, rank, rank, dtype=dtype, seed=2)
    cores[0] = 0
    slots = torch.tensor([3, 0, 1, 1, 2, 3, 0, 2, 1, 0, 0, 0, 0, 0])
    y, x = normal(14, 90, dtype=dtype, seed=3)[:, :80], normal(14, 72, dtype=dtype, seed=4)
    found, expected = y.clone(), y.clone()
    native.update(found, x, targets, cores, slots)
    REFERENCE.update(expected, x, targets, cores, slots)
    assert_near(found, expected)
    assert torch.equal(found[slots == 0], y[slots == 0])
    assert torch.equal(found[:, 40:56], y[:, 40:56])
    assert not torch.equal(found[slots == 1, :40], y[slots == 1, :40])
    alone = y[4:5].clone()
    native.update(alone, x[4:5], targets, cores, slots[4:5])
    assert torch.equal(alone[0], found[4])


@pytest.mark.parametrize("size", [5, 320, 49153])
def test_argmax(native: NativeKernels, dtype: torch.dtype, size: int) -> None:
    x = normal(6, size + 3, dtype=dtype)[:, :size]
    x[0, [1, 3]] = x.max() + 1  # equal ones: the first counts
    x[1] = -torch.inf
    x[2, -1] = x.max() + 1
    x[3] = -1 - x[3].abs()
    assert torch.equal(native.argmax(x), REFERENCE.argmax(x))
