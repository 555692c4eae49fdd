"""Kernels of some device beside the plain ones: tensors, steps and how near is near enough."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig

from lm_workers.adapters import UpdateTargets
from lm_workers.kv_cache import KVCache
from lm_workers.layers.kernels import HeadNorms, Kernels, LateUpdate
from lm_workers.layers.paged import PagedStep
from lm_workers.layers.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
BLOCK = 4
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Of the largest number: bfloat16 keeps 8 bits."""


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
