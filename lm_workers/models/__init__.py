"""The base model: one setting names it, one folder holds it, and these functions read it."""

from lm_workers.models.info import ModelInfo, describe_model, fingerprint
from lm_workers.models.load import (
    auto_dtype,
    load_causal_lm,
    load_embedding,
    load_lm_head,
    load_tokenizer,
    resolve_dtype,
)
from lm_workers.models.source import DEFAULT_MODEL, public_model, resolve_model

__all__ = [
    "DEFAULT_MODEL",
    "ModelInfo",
    "auto_dtype",
    "describe_model",
    "fingerprint",
    "load_causal_lm",
    "load_embedding",
    "load_lm_head",
    "load_tokenizer",
    "public_model",
    "resolve_dtype",
    "resolve_model",
]
