"""Models of a given shape with random weights: speed does not depend on what weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    },
}
"""Llama shapes by name."""

CONTEXT = 2048


def model_config(shape: str) -> LlamaConfig:
    """The config of a shape."""
    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def write_random_model(shape: str, folder: Path, dtype: torch.dtype, device: str) -> Path:
    """A model folder with weights drawn on `device`, and a tokenizer that has every token."""
    torch.manual_seed(0)
    config = model_config(shape)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *alphabet]
    words += [f"\u0120{number}" for number in range(vocab_size - len(words))]
    vocabulary = {word: place for place, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def streamed_bytes(shape: str, dtype: torch.dtype, batch: int, context: int) -> int:
    """Bytes that one decode step must read: every weight once, and the batch's keys and values.

    An input embedding that is not also the LM head is looked up row by row, and left out.
    """
    config = model_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    head = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head
    return (weights + cached * batch * context) * dtype.itemsize
