"""A model's config, and whether it is one of the Llama family."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from cluster_router.wire.errors import ModelError
from lm_workers.models.kept import KeptAnswer
from lm_workers.models.quiet import quiet_transformers

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
"""What the configs of these models call them."""


def load_config(path: Path) -> PretrainedConfig:
    """The language model's config at `path`, with what it leaves out filled in.

    That of a model of the family is kept, and not of its own class.
    """
    kept = KeptAnswer("configs", path)
    given = kept.read()
    if not isinstance(given, dict):
        config = _ask(path)
        if not is_family(config):
            return config
        given = config.to_dict()
        kept.keep(given)
    return PretrainedConfig.from_dict(given)


def is_family(config: PretrainedConfig) -> bool:
    """Whether `FamilyModel` can hold this model, and `DecoderLayer` compute its layers."""
    return config.model_type in FAMILY and config.hidden_act == "silu"


def _ask(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        # The config is anybody's: its readers fail with whatever they trip over.
        raise ModelError(f"the config in {path} cannot be read: {error}") from error
    return config.get_text_config()
