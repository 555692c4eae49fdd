"""Attention over the paged KV cache, plugged into transformers' model classes.

A step runs all its tokens as one flat sequence [1, T]. The model classes compute everything that
is per token; this function alone knows which tokens belong together. It serves the architectures
whose layers `lm_workers.layers.decoder` does not replace.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface

from cluster_router.wire.errors import ModelError
from lm_workers.layers.kernels import Kernels
from lm_workers.layers.paged import PagedStep

PAGED = "chameleon_paged"
"""Name under which the function is known to transformers (`attn_implementation`)."""

_CARRIED = {"dropout", "scaling", "sliding_window", "position_ids", "use_cache", "is_causal"}


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the interface passes it
    *,
    paged: PagedStep,
    kernels: Kernels,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Store this step's keys and values, then attend.

    Args:
        module: the attention layer; `layer_idx` says which.
        query: [1, heads, T, head_dim]; key and value: [1, kv_heads, T, head_dim].
        kernels: do the work.
        attention_mask: always None, see below.

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
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kernels.attend(query, paged, layer, scaling, sliding_window).unsqueeze(0), None


AttentionInterface.register(PAGED, paged_attention)
# There is no mask function of that name, so transformers builds no mask: the paged step says what
# each token may see.
