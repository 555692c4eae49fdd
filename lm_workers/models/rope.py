"""Rotary embeddings, and those whose frequencies depend on how long the text is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cluster_router.wire.errors import ModelError
from lm_workers.kv_cache import kv_geometry


class RotaryEmbedding:
    """Cosines and sines of positions, with the frequencies that a text begins with.

    Args:
        config: of a model whose layers all have the same.
        device: of the positions.
    """

    def __init__(self, config: PretrainedConfig, device: torch.device) -> None:
        given: Mapping[str, Any] = config.rope_parameters
        kind = given["rope_type"]
        if kind == "default":  # the only one that transformers leaves to the model classes
            size = kv_geometry(config)[2]
            halves = torch.arange(0, size, 2, dtype=torch.float32) / size
            frequencies, self._scaling = 1.0 / given["rope_theta"] ** halves, 1.0
        else:
            frequencies, self._scaling = ROPE_INIT_FUNCTIONS[kind](config)
        self._frequencies = frequencies.to(device, torch.float32)

    def __call__(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [..., T] -> cosines and sines [..., T, head_dim] in `dtype`."""
        angles = positions[..., None].float() * self._frequencies
        angles = torch.cat((angles, angles), -1)
        return (
            (angles.cos() * self._scaling).to(dtype),
            (angles.sin() * self._scaling).to(dtype),
        )


def check_rope(config: PretrainedConfig, max_context: int) -> None:
    """Refuse contexts within which a model changes its frequencies.

    A step holds many texts, and a cache their keys from before: with frequencies that change as a
    text grows, texts would be computed with those of the longest beside them, and their own keys
    with different ones.

    Raises:
        ModelError: texts of `max_context` tokens, or shorter ones, have other frequencies.
    """
    for kind, longest in _changing(config):
        if max_context > longest:
            raise ModelError(
                f"this model's rotary embedding ({kind}) has other frequencies for texts beyond "
                f"{longest} tokens, which the engine cannot mix with shorter ones; set "
                f"engine.max_context to at most {longest}, or serve it with vLLM "
                "(`engine: {backend: vllm}`)"
            )


def _changing(config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Kinds of rotary embedding that change, and the longest text before they do."""
    given: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one for each type of layer.
    for one in (given, *given.values()):
        kind = one.get("rope_type", "") if isinstance(one, Mapping) else ""
        if kind == "longrope":
            yield kind, int(one["original_max_position_embeddings"])
        elif "dynamic" in kind:
            yield kind, int(config.max_position_embeddings)
