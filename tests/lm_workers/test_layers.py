"""Layouts and kernels against their plain implementations."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig

from lm_workers.adapters import UpdateTargets
from lm_workers.kv_cache import KVCache
from lm_workers.layers.kernels import HeadNorms, Kernels, LateUpdate
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


class Carried:
    """Kernels of some device, for tensors of the CPU."""

    def __init__(self, kernels: Kernels, device: str) -> None:
        self._kernels, self._device = kernels, device

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor | None]:
        def call(*args: object) -> torch.Tensor | None:
            moved = [self._there(one) for one in args]
            found = getattr(self._kernels, name)(*moved)
            for here, there in zip(args, moved, strict=True):
                self._back(here, there)
            return None if found is None else found.cpu()

        return call

    def _there(self, one: Any) -> Any:
        if isinstance(one, torch.Tensor):
            return one.to(self._device)
        if isinstance(one, tuple):
            return tuple(self._there(part) for part in one)
        if isinstance(one, HeadNorms):
            return HeadNorms(self._there(one.query), self._there(one.key), one.eps)
        if isinstance(one, LateUpdate):
            parts = (one.low, one.targets, one.cores, one.slots)
            return LateUpdate(*map(self._there, parts))
        if isinstance(one, UpdateTargets):
            return UpdateTargets(one.targets, self._there(one.u), self._there(one.v))
        if isinstance(one, PagedStep):
            names = ("write_slots", "lengths", "tables")
            cache = copy(one.cache)
            cache.keys = [self._there(kept) for kept in one.cache.keys]
            cache.values = [self._there(kept) for kept in one.cache.values]
            return replace(
                one, cache=cache, **{name: self._there(getattr(one, name)) for name in names}
            )
        return one

    def _back(self, here: Any, there: Any) -> None:
        if isinstance(here, torch.Tensor):
            here.copy_(there)
        if isinstance(here, PagedStep):
            mine, kept = here.cache, there.cache
            for one, other in zip(mine.keys + mine.values, kept.keys + kept.values, strict=True):
                one.copy_(other)


@pytest.fixture(params=["native", "triton"])
def compiled(request: pytest.FixtureRequest, dtype: torch.dtype) -> Carried:
    """Kernels in C++, and those in Triton: on a GPU, or in Triton's interpreter where none is."""
    if request.param == "native":
        request.getfixturevalue("cxx")
        return Carried(NativeKernels(dtype, threads=2), "cpu")
    pytest.importorskip("triton", reason="needs Triton")
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter cuts bfloat16 off where a GPU rounds it")
    from lm_workers.layers.gpu import GpuKernels

    return Carried(GpuKernels(), "cuda" if torch.cuda.is_available() else "cpu")


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
    return PagedStep(cache, BLOCK, torch.cat(write), spans, spans[:, 2].contiguous(), tables)


@pytest.mark.parametrize("size", [8, 64, 576, 1000])
def test_norms(compiled: Carried, dtype: torch.dtype, size: int) -> None:
    x, weight = normal(5, size, dtype=dtype), normal(size, dtype=dtype, seed=1)
    assert_near(compiled.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    wide = normal(5, size + 24, dtype=dtype, seed=2)[:, :size]
    sums = [x.clone(), x.clone()]
    found = compiled.add_rms_norm(sums[0], wide, weight, 1e-5)
    assert_near(found, REFERENCE.add_rms_norm(sums[1], wide, weight, 1e-5))
    assert torch.equal(*sums)


@pytest.mark.parametrize("size", [10, 1536])
def test_silu_mul(compiled: Carried, dtype: torch.dtype, size: int) -> None:
    x = normal(7, 2 * size + 16, dtype=dtype, scale=20)[:, : 2 * size]
    assert_near(compiled.silu_mul(x), REFERENCE.silu_mul(x))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 2, 8), (6, 6, 40)])
def test_rotate_and_store(
    compiled: Carried, dtype: torch.dtype, heads: int, kv_heads: int, size: int, normed: bool
) -> None:
    step = paged(dtype, [(1, 9), (5, 12)], kv_heads, size)
    other = replace(step, cache=paged(dtype, [(1, 9), (5, 12)], kv_heads, size).cache)
    qkv = normal(6, (heads + 2 * kv_heads) * size + 8, dtype=dtype)[:, :-8]
    angles = normal(6, size, dtype=torch.float32, seed=4)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = normal(size, dtype=dtype, seed=5), normal(size, dtype=dtype, seed=6)
    norms = HeadNorms(*weights, 1e-6) if normed else None
    expected = REFERENCE.rotate_and_store(qkv.clone(), rotary, norms, other, 1)
    assert_near(compiled.rotate_and_store(qkv, rotary, norms, step, 1), expected)
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


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_update(compiled: Carried, dtype: torch.dtype, rank: int) -> None:
    sites = torch.tensor([[2, 0, 40], [0, 56, 24]])
    targets = UpdateTargets(sites, normal(rank, 64, dtype=dtype, seed=1), torch.empty(0))
    cores = normal(4, 3, rank, rank, dtype=dtype, seed=2)
    cores[0] = 0
    slots = torch.tensor([3, 0, 1, 1, 2, 3, 0, 2, 1] + [0] * 16)
    y = normal(25, 90, dtype=dtype, seed=3)[:, :80]
    low = normal(25, 2 * rank + 5, dtype=dtype, seed=4)[:, 5:]
    found, expected = y.clone(), y.clone()
    compiled.update(found, LateUpdate(low, targets, cores, slots))
    REFERENCE.update(expected, LateUpdate(low, targets, cores, slots))
    assert_near(found, expected)
    assert torch.equal(found[slots == 0], y[slots == 0])
    assert torch.equal(found[:, 40:56], y[:, 40:56])
    assert not torch.equal(found[slots == 1, :40], y[slots == 1, :40])
    for some in (slice(4, 5), slice(2, 5)):  # no row depends on how many are beside it
        fewer = y[some].clone()
        compiled.update(fewer, LateUpdate(low[some], targets, cores, slots[some]))
        assert torch.equal(fewer, found[some])


@pytest.mark.parametrize("rank", [4, 16, 32])
def test_late_updates(compiled: Carried, dtype: torch.dtype, rank: int) -> None:
    slots, cores = torch.tensor([3, 0, 1, 1, 2] * 4), normal(4, 3, rank, rank, dtype=dtype, seed=2)
    cores[0] = 0

    def late(*sites: list[int]) -> LateUpdate:
        """Of outputs whose columns [first, first + count) are of a site."""
        low = normal(20, len(sites) * rank + 3, dtype=dtype, seed=3, scale=0.3)[:, 3:]
        columns = sum(count for _, _, count in sites)
        u, v = normal(rank, columns, dtype=dtype, seed=4), normal(1, 1, dtype=dtype)
        return LateUpdate(low, UpdateTargets(torch.tensor(sites), u, v), cores, slots)

    x, residual = normal(20, 203, dtype=dtype)[:, :200], normal(20, 200, dtype=dtype, seed=1)
    weight = normal(200, dtype=dtype, seed=5)
    for one in (late([1, 0, 200]), None):
        found, expected = residual.clone(), residual.clone()
        compiled.add(found, x.clone(), one)
        REFERENCE.add(expected, x.clone(), one)
        assert_near(found, expected)
        found, expected = residual.clone(), residual.clone()
        normed = compiled.add_rms_norm(found, x.clone(), weight, 1e-5, one)
        assert_near(normed, REFERENCE.add_rms_norm(expected, x.clone(), weight, 1e-5, one))
        assert_near(found, expected)
    for one in (late([0, 0, 100], [2, 100, 100]), late([2, 100, 100])):
        found, expected = (kernels.silu_mul(x.clone(), one) for kernels in (compiled, REFERENCE))
        assert_near(found, expected)
        assert not torch.equal(found[slots > 0], REFERENCE.silu_mul(x)[slots > 0])
        assert_near(found[slots == 0], REFERENCE.silu_mul(x)[slots == 0])

    step = paged(dtype, [(1, 9), (19, 30)], 2, 20)
    other = replace(step, cache=paged(dtype, [(1, 9), (19, 30)], 2, 20).cache)
    angles, qkv = normal(20, 20, dtype=torch.float32, seed=4), normal(20, 160, dtype=dtype, seed=8)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    one = late([1, 0, 80], [0, 120, 40])  # queries and values
    expected = REFERENCE.rotate_and_store(qkv.clone(), rotary, None, other, 1, one)
    assert_near(compiled.rotate_and_store(qkv.clone(), rotary, None, step, 1, one), expected)
    assert_near(step.cache.keys[1], other.cache.keys[1])
    assert_near(step.cache.values[1], other.cache.values[1])
    plain = REFERENCE.rotate_and_store(qkv.clone(), rotary, None, other, 1)
    assert not torch.equal(expected[slots > 0], plain[slots > 0])


@pytest.mark.parametrize("size", [5, 320, 49153])
def test_argmax(compiled: Carried, dtype: torch.dtype, size: int) -> None:
    x = normal(6, size + 3, dtype=dtype)[:, :size]
    x[0, [1, 3]] = x.max() + 1  # equal ones: the first counts
    x[1] = -torch.inf
    x[2, -1] = x.max() + 1
    x[3] = -1 - x[3].abs()
    x[4, [2, -1]] = x.max() + 1
    assert torch.equal(compiled.argmax(x), REFERENCE.argmax(x))
