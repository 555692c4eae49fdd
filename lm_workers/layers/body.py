"""From tokens to final hidden states, through all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lm_workers.layers.kernels import Kernels
from lm_workers.layers.linear import Lookup
from lm_workers.layers.paged import PagedStep
from lm_workers.layers.stack import DecoderStack


class TransformersBody(nn.Module):
    """A model as transformers runs it.

    Args:
        model: without its head.
        kernels: attention's.
    """

    def __init__(self, model: nn.Module, kernels: Kernels) -> None:
        super().__init__()
        self.model, self._kernels = model, kernels

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, paged: PagedStep
    ) -> torch.Tensor:
        """tokens [T] at positions [T] -> [T, d]."""
        hidden: torch.Tensor = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            paged=paged,
            kernels=self._kernels,
        ).last_hidden_state[0]
        return hidden


class StackBody(nn.Module):
    """The same for a model of the family, all whose layers are one stack.

    Transformers' own way there takes as long as one of the layers does in a decoding step.

    Args:
        model: without its head; its rotary embedding and final norm are used.
        embedding: its own, or what stands for it.
        stack: its layers.
        kernels: the norm's.
    """

    def __init__(
        self, model: Any, embedding: Lookup, stack: DecoderStack, kernels: Kernels
    ) -> None:
        super().__init__()
        self.embedding, self.stack, self._kernels = embedding, stack, kernels
        self._rotary = model.rotary_emb.forward
        self._norm, self._eps = model.norm.weight.data, float(model.norm.variance_epsilon)

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, paged: PagedStep
    ) -> torch.Tensor:
        """tokens [T] at positions [T] -> [T, d]."""
        hidden = self.embedding(tokens)[None]
        rotary = self._rotary(hidden, positions[None])
        hidden = self.stack.forward(hidden, position_embeddings=rotary, paged=paged)
        return self._kernels.rms_norm(hidden[0], self._norm, self._eps)
