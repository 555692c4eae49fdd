"""Layouts and kernels against their plain implementations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_cases import REFERENCE, Carried, assert_near, normal, paged

from lm_workers.adapters import UpdateTargets
from lm_workers.layers.kernels import HeadNorms, LateUpdate


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


@pytest.mark.parametrize("rank", [4, 5, 8, 16, 32])
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
