"""Models with random weights, and what a decode step must read of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving_bench.random_models import SHAPES, model_config, streamed_bytes, write_random_model

from lm_workers.models import describe_model, load_tokenizer


def test_weights_that_a_step_reads() -> None:
    # 134.5 million parameters, all read; 8.03 billion, of which the input embedding is not.
    assert streamed_bytes("smollm2-135m", torch.bfloat16, 0, 0) == 2 * 134_515_008
    assert streamed_bytes("llama-8b", torch.bfloat16, 0, 0) == 2 * (8_030_261_248 - 128_256 * 4096)


def test_keys_and_values_that_a_step_reads() -> None:
    grown = streamed_bytes("llama-8b", torch.bfloat16, 32, 1000)
    per_token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, sizes, bytes
    assert grown - streamed_bytes("llama-8b", torch.bfloat16, 0, 0) == 32_000 * per_token


def test_every_token_of_a_random_model_has_a_text(tmp_path: Path) -> None:
    folder = write_random_model("tiny", tmp_path / "model", torch.float32, "cpu")
    tokenizer = load_tokenizer(folder)
    vocab_size = SHAPES["tiny"]["vocab_size"]
    assert len(tokenizer) == vocab_size == describe_model(folder, "tiny").vocab_size
    texts = [tokenizer.decode([token]) for token in range(300, vocab_size)]
    assert all(texts) and len(set(texts)) == len(texts)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_heads_fill_the_hidden_size(shape: str) -> None:
    config = model_config(shape)
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert config.num_attention_heads % config.num_key_value_heads == 0
