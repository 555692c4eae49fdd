"""The frozen base model as training sees it: an encoder, a head, an embedding and a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth, UpdateSpec
from lm_workers.models import (
    fingerprint,
    load_causal_lm,
    load_tokenizer,
    resolve_dtype,
    resolve_model,
)


@dataclass(frozen=True)
class FrozenBase:
    """One base model at `path`, loaded when first needed, in the fastest dtype of the device.

    Loading is put off because a run whose features are cached never runs the model itself.
    """

    path: Path
    device: str = "cpu"

    @classmethod
    def resolve(cls, model: str, device: str = "cpu") -> FrozenBase:
        """The model that a setting names; see `lm_workers.models.resolve_model`."""
        return cls(resolve_model(model), device)

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights."""
        return fingerprint(self.path)

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return load_tokenizer(self.path)

    @cached_property
    def model(self) -> nn.Module:
        """The causal LM, frozen."""
        return load_causal_lm(self.path, resolve_dtype("auto", self.device), self.device)

    @cached_property
    def head(self) -> torch.Tensor:
        """[vocabulary, d] in the model's dtype, the weight of the LM head."""
        weight: torch.Tensor = self.model.get_output_embeddings().weight  # type: ignore[operator]
        return weight.detach()

    @cached_property
    def embedding(self) -> torch.Tensor:
        """[vocabulary, d] in the model's dtype, the input embedding; on the CPU on any device.

        Prompts are embedded and token weights computed there, with the arithmetic of a router.
        """
        weight: torch.Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight.detach().cpu()

    def spec(self, depth: Depth, rank: int) -> UpdateSpec:
        """Shape of an update of this model."""
        return discover_sites(self.model, depth, rank)

    @torch.inference_mode()
    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Final hidden states [B, T, d], what the LM head is applied to.

        Args:
            tokens: int64 [B, T].
            mask: int64 [B, T], 1 for tokens, 0 for padding on the right.
        """
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        output = decoder(
            input_ids=tokens.to(self.device), attention_mask=mask.to(self.device), use_cache=False
        )
        states: torch.Tensor = output.last_hidden_state
        return states.cpu()
