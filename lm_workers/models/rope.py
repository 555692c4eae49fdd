"""Rotary embeddings whose frequencies depend on how long the text is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from cluster_router.wire.errors import ModelError


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
