"""What the rest of the service needs to know of a base model, and a stable id for it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cluster_router.wire.errors import ModelError
from lm_workers.models.config import load_config
from lm_workers.models.load import find_embedding, load_tokenizer
from lm_workers.models.weights import StoredTensor, read_json, stored_tensors

EMBEDDING_ROWS = 256
"""How many rows of the embedding a fingerprint covers."""
MATRIX_ROWS = 2
"""How many rows of every other matrix; a fine-tune moves all of them, however it was trained."""


@dataclass(frozen=True)
class ModelInfo:
    """A base model as its users see it.

    `context_length` is in tokens. `vocab_size` is the number of logits, which may exceed the
    tokenizer's. `eos_token_ids` is sorted; any of them ends an answer.
    """

    name: str
    context_length: int
    vocab_size: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def describe_model(path: Path, name: str) -> ModelInfo:
    """Read the facts of the model at `path`, served as `name`, without loading its weights."""
    config = load_config(path)
    tokenizer = load_tokenizer(path)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the model only "
            f"{config.vocab_size}; put the model's own tokenizer there"
        )
    context_length = getattr(config, "max_position_embeddings", None)
    if context_length is None:
        raise ModelError(f"the config in {path} sets no max_position_embeddings; add it")
    return ModelInfo(
        name=name,
        context_length=context_length,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        eos_token_ids=_eos_token_ids(path, config, tokenizer),
        fingerprint=fingerprint(path),
    )


def fingerprint(path: Path) -> str:
    """Sixteen hex digits that name the base model at `path`.

    Covers the architecture and a fixed sample of every weight, rounded to bfloat16: a float32 copy
    of a bfloat16 model has the same id, a fine-tune another. (A float16 copy has another too:
    it has lost the smallest numbers.) Independent of shards and of the names' outermost prefix.
    """
    config = load_config(path)
    facts = (
        config.model_type,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.vocab_size,
    )
    digest = hashlib.sha256(repr(facts).encode())
    tensors = stored_tensors(path)
    embedding = find_embedding(tensors)
    weights = [t for t in tensors.values() if _is_weight(t, bool(config.tie_word_embeddings))]
    for tensor in sorted(weights, key=lambda t: _short(t.name)):
        rows = EMBEDDING_ROWS if tensor is embedding else MATRIX_ROWS
        sample = tensor.read(None if len(tensor.shape) == 1 else rows).to(torch.bfloat16)
        digest.update(_short(tensor.name).encode())
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_weight(tensor: StoredTensor, tied: bool) -> bool:
    """Neither a buffer (old checkpoints store masks) nor a head that repeats the embedding."""
    if tensor.name.endswith("inv_freq") or not 1 <= len(tensor.shape) <= 3:
        return False
    return not (tied and tensor.name.startswith("lm_head."))


def _short(name: str) -> str:
    """The weight's name without the base model's prefix, which only some checkpoints carry."""
    return name.removeprefix("model.").removeprefix("transformer.")


def _eos_token_ids(
    path: Path, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    sources = [config.eos_token_id, tokenizer.eos_token_id]
    if (path / "generation_config.json").is_file():
        sources.append(read_json(path / "generation_config.json").get("eos_token_id"))
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list) else [] if source is None else [source])
    return tuple(sorted(ids))
