"""One decoder layer of the Llama family, with few calls: the products in four groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lm_workers.layers.kernels import HeadNorms, Kernels
from lm_workers.layers.linear import LinearGroup
from lm_workers.layers.paged import PagedStep
from lm_workers.models.family import Attention, Layer, Norm

GroupMaker = Callable[[Sequence[str]], LinearGroup]
"""Makes one group of the linear layers with these names inside the layer."""


class DecoderLayer(nn.Module):
    """Gives the numbers of transformers' layers of the family (`lm_workers/models/config.py`).

    Args:
        layer: facts and weights.
        group: makes groups of its linear layers.
        kernels: compute everything else.
    """

    def __init__(self, layer: Layer, group: GroupMaker, kernels: Kernels) -> None:
        super().__init__()
        attention = layer.self_attn
        self._kernels = kernels
        self._index = layer.index
        self._scaling, self._window = attention.scaling, attention.window
        self._head_norms = _head_norms(attention)
        self._norm, self._norm_eps = _norm(layer.input_layernorm)
        self._post_norm, self._post_eps = _norm(layer.post_attention_layernorm)
        # Not registered with torch, whose lookups and calls take longer than small products.
        self._qkv = group([f"self_attn.{name}_proj" for name in "qkv"]).leave
        self._out = group(["self_attn.o_proj"]).leave
        self._gate_up = group(["mlp.gate_proj", "mlp.up_proj"]).leave
        self._down = group(["mlp.down_proj"]).leave

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged: PagedStep,
        **_: object,
    ) -> torch.Tensor:
        """hidden_states [1, T, d], which changes in place -> [1, T, d].

        Args:
            position_embeddings: cosines and sines, each [1, T, head_dim].
            paged: the step.
        """
        kernels, residual = self._kernels, hidden_states[0]
        rotary = position_embeddings[0][0], position_embeddings[1][0]
        normed = kernels.rms_norm(residual, self._norm, self._norm_eps)
        qkv, late = self._qkv(normed)
        query = kernels.rotate_and_store(qkv, rotary, self._head_norms, paged, self._index, late)
        attended = kernels.attend(query, paged, self._index, self._scaling, self._window)
        out, late = self._out(attended.flatten(1))
        normed = kernels.add_rms_norm(residual, out, self._post_norm, self._post_eps, late)
        gate_up, late = self._gate_up(normed)
        down, late = self._down(kernels.silu_mul(gate_up, late))
        kernels.add(residual, down, late)
        return hidden_states


def _norm(norm: Norm) -> tuple[torch.Tensor, float]:
    return norm.weight.data, norm.eps


def _head_norms(attention: Attention) -> HeadNorms | None:
    if attention.q_norm is None or attention.k_norm is None:
        return None
    query, eps = _norm(attention.q_norm)
    return HeadNorms(query, _norm(attention.k_norm)[0], eps)
