"""Attention over the paged KV cache, plugged into transformers' model classes.

A step runs all its tokens as one flat sequence [1, T]. The model classes compute everything that
is per token; this function alone knows which tokens belong together. Sequences that add one token
(decoding) come first and run as one padded batch; the others (prefill chunks) run one by one,
without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from cluster_router.wire.errors import ModelError
from lm_workers.kv_cache import KVCache

PAGED = "chameleon_paged"
"""Name under which the function is known to transformers (`attn_implementation`)."""

KV_ALIGN = 32
"""Keys and values are read in multiples of this many tokens.

Vectorised kernels treat the remainder of a row apart from the rest and round it differently. With
whole multiples a sequence's numbers do not depend on how long its neighbours are.
"""

_CARRIED = {"dropout", "scaling", "sliding_window", "position_ids", "use_cache", "is_causal"}


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """Tokens `start:stop` of the step are the last `stop - start` of the first `kv_length` slots.

    `slots` is padded like `PagedStep.decode_slots`.
    """

    start: int
    stop: int
    kv_length: int
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class PagedStep:
    """Where the tokens of one step live.

    Attributes:
        cache: the tensors.
        write_slots: int64 [T], where each token's key and value go.
        decode_slots: int64 [D, L], all cached tokens of the D decoding sequences, padded with 0.
            L is a multiple of `KV_ALIGN`.
        decode_lengths: int64 [D].
        prefills: the other sequences.
    """

    cache: KVCache
    write_slots: torch.Tensor
    decode_slots: torch.Tensor
    decode_lengths: torch.Tensor
    prefills: tuple[PrefillSpan, ...]


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the interface passes it
    *,
    paged: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Store this step's keys and values, then attend.

    Args:
        module: the attention layer; `layer_idx` says which.
        query: [1, heads, T, head_dim]; key and value: [1, kv_heads, T, head_dim].
        attention_mask: always None, see `PAGED`'s mask function.

    Returns:
        [1, T, heads, head_dim] and None for the weights.

    Raises:
        ModelError: the model asks for a kind of attention that is not implemented here.
    """
    asked = {name for name, given in options.items() if given is not None}
    unsupported = sorted(asked - _CARRIED)
    if unsupported:
        raise ModelError(f"this model's attention uses {unsupported}, which the engine cannot do")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    paged.cache.write(layer, paged.write_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    query = query[0].transpose(0, 1)
    decoding = len(paged.decode_lengths)
    parts = []
    if decoding:
        parts.append(_decode(query[:decoding], layer, paged, scaling, sliding_window))
    parts += [
        _prefill(query, layer, span, paged, scaling, sliding_window) for span in paged.prefills
    ]
    return torch.cat(parts).unsqueeze(0), None


def _decode(
    query: torch.Tensor, layer: int, paged: PagedStep, scaling: float | None, window: int | None
) -> torch.Tensor:
    """query [D, heads, head_dim] -> the same shape."""
    keys, values = paged.cache.read(layer, paged.decode_slots)
    kv_heads = keys.shape[2]
    positions = torch.arange(keys.shape[1], device=query.device)
    ends = paged.decode_lengths[:, None]
    visible = positions < ends
    if window is not None:
        visible &= positions >= ends - window
    # Heads that share a KV head become rows of one small query, so nothing is repeated.
    grouped = query.view(len(query), kv_heads, -1, query.shape[-1])
    out = F.scaled_dot_product_attention(
        grouped,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        scale=scaling,
    )
    return out.reshape(query.shape)


def _prefill(
    query: torch.Tensor,
    layer: int,
    span: PrefillSpan,
    paged: PagedStep,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The span's rows of query [T, heads, head_dim] -> [stop - start, heads, head_dim]."""
    keys, values = paged.cache.read(layer, span.slots)
    positions = torch.arange(len(span.slots), device=query.device)
    first = span.kv_length - (span.stop - span.start)
    ends = positions[first : span.kv_length, None]
    visible = positions <= ends
    if window is not None:
        visible &= positions > ends - window
    out = F.scaled_dot_product_attention(
        query[span.start : span.stop].transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=visible,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out[0].transpose(0, 1)


def _no_mask(*args: object, **kwargs: object) -> None:
    """The paged step says what each token may see; transformers need not build a mask."""


AttentionInterface.register(PAGED, paged_attention)
AttentionMaskInterface.register(PAGED, _no_mask)
