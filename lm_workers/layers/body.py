"""From tokens to final hidden states, through all layers."""

from __future__ import annotations

import torch
from torch import nn

from lm_workers.layers.kernels import Kernels
from lm_workers.layers.linear import Lookup
from lm_workers.layers.paged import PagedStep
from lm_workers.layers.stack import DecoderStack
from lm_workers.models.family import FamilyModel
from lm_workers.models.rope import RotaryEmbedding


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

    Args:
        model: its rotary embedding and final norm are used.
        embedding: its own, or what stands for it.
        stack: its layers.
        kernels: the norm's.
        dtype: to compute in.
    """

    def __init__(
        self,
        model: FamilyModel,
        embedding: Lookup,
        stack: DecoderStack,
        kernels: Kernels,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.embedding, self.stack, self._kernels, self._dtype = embedding, stack, kernels, dtype
        self._rotary = RotaryEmbedding(model.config, model.device)
        norm = model.model.norm
        self._norm, self._eps = norm.weight.data, norm.eps

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, paged: PagedStep
    ) -> torch.Tensor:
        """tokens [T] at positions [T] -> [T, d]."""
        hidden = self.embedding(tokens)[None].to(self._dtype)
        rotary = self._rotary(positions[None], self._dtype)
        hidden = self.stack.forward(hidden, position_embeddings=rotary, paged=paged)
        return self._kernels.rms_norm(hidden[0], self._norm, self._eps)
