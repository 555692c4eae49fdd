"""One decoder layer of the Llama family, with few calls: the products in four groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from lm_workers.layers.kernels import HeadNorms, Kernels
from lm_workers.layers.linear import LinearGroup
from lm_workers.layers.paged import PagedStep

FAMILY = {
    "llama": LlamaDecoderLayer,
    "mistral": MistralDecoderLayer,
    "qwen2": Qwen2DecoderLayer,
    "qwen3": Qwen3DecoderLayer,
}
"""Layers that `DecoderLayer` computes, by what configs call their models. Exactly these: a subclass
may compute something else."""

GroupMaker = Callable[[Sequence[str]], LinearGroup]
"""Makes one group of the linear layers with these names inside the layer."""


def is_family(layer: nn.Module) -> bool:
    """Whether `DecoderLayer` can take this layer's place."""
    known = type(layer) in FAMILY.values()
    return known and layer.mlp.config.hidden_act == "silu"  # type: ignore[union-attr]


def is_family_config(config: PretrainedConfig) -> bool:
    """Whether `DecoderLayer` will take the place of every layer of this model."""
    return config.model_type in FAMILY and config.hidden_act == "silu"


class DecoderLayer(nn.Module):
    """Takes the place of a transformers layer of the `FAMILY`; gives the same numbers.

    Args:
        layer: the layer.
        group: makes groups of its linear layers.
        kernels: compute everything else.
    """

    def __init__(self, layer: Any, group: GroupMaker, kernels: Kernels) -> None:
        super().__init__()
        attention = layer.self_attn
        self._kernels = kernels
        self._index = int(attention.layer_idx)
        self._scaling = float(attention.scaling)
        self._window = _window(attention)
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


def _norm(module: Any) -> tuple[torch.Tensor, float]:
    return module.weight.data, float(module.variance_epsilon)


def _head_norms(attention: Any) -> HeadNorms | None:
    if not hasattr(attention, "q_norm"):
        return None
    query, eps = _norm(attention.q_norm)
    return HeadNorms(query, _norm(attention.k_norm)[0], eps)


def _window(attention: Any) -> int | None:
    """Tokens that a query sees, None for all: on the layer, or for Mistral in its config."""
    if isinstance(attention, MistralAttention):
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)
