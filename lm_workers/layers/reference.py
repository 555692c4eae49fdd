"""The kernels in plain torch, on any device: what the others are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from lm_workers.layers.kernels import HeadNorms, LateUpdate
from lm_workers.layers.paged import KV_ALIGN, PagedStep

_MOST_SLOTS = 2**17
"""Tokens of context that rows which decode together read, each as many as the longest of them.

Torch's attention copies the keys and values that it reads.
"""

_ALIGNED = frozenset({"cpu"})
"""Where prompts too read keys in multiples of `KV_ALIGN`, so that in bfloat16 no number depends on
the chunks they come in. On a GPU that takes a mask, with which torch writes every score out."""


class ReferenceKernels:
    """See `Kernels`."""

    late_rank: ClassVar[int] = 0
    most_context: ClassVar[int | None] = _MOST_SLOTS
    taped: ClassVar[bool] = False

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels`."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * (wide * scale).to(x.dtype)

    def add(self, residual: torch.Tensor, x: torch.Tensor, late: LateUpdate | None) -> None:
        """See `Kernels`."""
        self._catch_up(x, late)
        residual += x

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """See `Kernels`."""
        self.add(residual, x, late)
        return self.rms_norm(residual, weight, eps)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
        paged: PagedStep,
        layer: int,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """See `Kernels`."""
        self._catch_up(qkv, late)
        _, kv_heads, size = paged.cache.keys[layer].shape
        heads = qkv.unflatten(-1, (-1, size))
        query, key, value = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
        if norms is not None:
            query = self.rms_norm(query, norms.query, norms.eps)
            key = self.rms_norm(key, norms.key, norms.eps)
        paged.cache.write(layer, paged.write_slots, _rotate(key, *rotary), value)
        return _rotate(query, *rotary)

    def attend(
        self,
        query: torch.Tensor,
        paged: PagedStep,
        layer: int,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """See `Kernels`. Spans of one row run in padded batches, the others one by one."""
        spans = paged.spans.tolist()
        decoding = sum(stop - start == 1 for start, stop, _ in spans)
        parts = []
        if decoding:
            parts.append(_decode_all(query[:decoding], paged, layer, scaling, window))
        slots = paged.token_slots[decoding:]
        for (start, stop, length), row in zip(spans[decoding:], slots, strict=True):
            keys, values = paged.cache.read(layer, row[: _aligned(length)])
            parts.append(prefill(query[start:stop], keys, values, length, scaling, window))
        return torch.cat(parts)

    def silu_mul(self, gate_up: torch.Tensor, late: LateUpdate | None = None) -> torch.Tensor:
        """See `Kernels`."""
        self._catch_up(gate_up, late)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        return x.argmax(-1)

    def update(self, y: torch.Tensor, late: LateUpdate) -> None:
        """See `Kernels`. Slot 0 holds zeros."""
        targets, rank, width = late.targets, late.cores.shape[-1], 0
        low = late.low.unflatten(-1, (-1, rank, 1))
        for number, (site, first, columns) in enumerate(targets.targets.tolist()):
            inner = torch.bmm(late.cores[late.slots, site], low[:, number]).squeeze(-1)
            y[:, first : first + columns] += inner @ targets.u[:, width : width + columns]
            width += columns

    def _catch_up(self, y: torch.Tensor, late: LateUpdate | None) -> None:
        if late is not None:
            self.update(y, late)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, head_dim]; the halves of a head are real and imaginary parts."""
    left, right = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat((-right, left), -1) * sine[:, None]


def _aligned(length: int) -> int:
    return -(-length // KV_ALIGN) * KV_ALIGN


def group_rows(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut rows that decode into groups, so that none reads more than `_MOST_SLOTS` but a lone row.

    Args:
        lengths: tokens of each row, ascending, so that short rows are not padded like long ones.

    Returns:
        Of each group the number of rows, and the tokens that all of them are padded to.
    """
    groups, size, padded = [], 0, 0
    for longest in map(_aligned, lengths):
        if size and (size + 1) * longest > _MOST_SLOTS:
            groups.append((size, padded))
            size = 0
        size, padded = size + 1, longest
    return [*groups, (size, padded)]


def _decode_all(
    query: torch.Tensor, paged: PagedStep, layer: int, scaling: float, window: int | None
) -> torch.Tensor:
    """query [D, heads, head_dim] of the first D spans, which are of one row, in groups."""
    count = len(query)
    slots, lengths = paged.token_slots[:count], paged.lengths[:count]
    groups = group_rows(sorted(paged.spans[:count, 2].tolist()))
    if len(groups) == 1:
        keys, values = paged.cache.read(layer, slots[:, : groups[0][1]])
        return _decode(query, keys, values, lengths, scaling, window)
    # In the order of `groups`, found without waiting for the device: none of `lengths` is above
    # that of its span, so the same holds for both in ascending order.
    order = lengths.argsort().split([size for size, _ in groups])
    out = torch.empty_like(query)
    for rows, (_, padded) in zip(order, groups, strict=True):
        keys, values = paged.cache.read(layer, slots[:, :padded][rows])
        out[rows] = _decode(query[rows], keys, values, lengths[rows], scaling, window)
    return out


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """query [D, heads, head_dim] over keys and values [D, L, kv_heads, head_dim]."""
    positions = torch.arange(keys.shape[1], device=query.device)
    ends = lengths[:, None]
    visible = positions < ends
    if window is not None:
        visible &= positions >= ends - window
    # Heads that share a KV head become rows of one small query, so nothing is repeated.
    out = F.scaled_dot_product_attention(
        query.reshape(len(query), keys.shape[2], -1, query.shape[-1]),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        scale=scaling,
    )
    return out.reshape(query.shape)


def prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """query [N, heads, head_dim], the last N of `length` tokens, over [L, kv_heads, head_dim]."""
    windowed = window is not None and length > window
    if query.device.type not in _ALIGNED and not windowed:
        # Imports torch's compiler, which takes memory that no process on a CPU needs to give.
        from torch.nn.attention.bias import causal_lower_right

        written, mask = None, cast(torch.Tensor, causal_lower_right(len(query), length))
        keys, values = keys[:length], values[:length]
    else:
        positions = torch.arange(len(keys), device=query.device)
        ends = positions[length - len(query) : length, None]
        mask = positions <= ends
        if window is not None:
            mask &= positions > ends - window
        written = mask
    query, keys, values = (one.transpose(0, 1).unsqueeze(0) for one in (query, keys, values))
    shared = query.shape[1] // keys.shape[1]
    if shared > 1 and not _takes_flash(query, keys, values, written):
        # Heads that share keys are otherwise left to a kernel that writes every score out.
        keys, values = (one.repeat_interleave(shared, 1) for one in (keys, values))
    out = F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)


def _takes_flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Whether this is for flash attention, which knows the causal mask (None) and no other."""
    params = SDPAParams(query, keys, values, mask, 0.0, False, True)
    found: bool = can_use_flash_attention(params)
    return found
