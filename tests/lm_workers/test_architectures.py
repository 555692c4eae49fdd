"""Which architectures are served, as transformers computes them, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GPTJConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    StableLmConfig,
)

from cluster_router.wire.errors import ModelError
from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.engine import Failure
from lm_workers.models import load_causal_lm
from lm_workers.models.rope import check_rope

SIZES = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA_LIKE = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
}
ORIGINAL = {"original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}

Save = Callable[[PretrainedConfig], Path]


@pytest.fixture
def save(save_drawn: Callable[..., Path]) -> Save:
    """Save a model of a config, with random weights that are large enough to tell texts apart."""

    def draw(parameter: torch.nn.Parameter) -> None:
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)

    return lambda config: save_drawn(config, draw)


def settings(**changes: object) -> EngineConfig:
    given = {"dtype": "float32", "block_size": 4, "kv_cache_tokens": 1024, "cpu_threads": 1}
    return EngineConfig.model_validate({**given, "max_batch_tokens": 40, **changes})


def assert_served(folder: Path, config: EngineConfig, lengths: list[int], count: int) -> None:
    """Texts that run side by side, in chunks, get the tokens that transformers gives each."""
    engine = build_engine(folder, config)
    sampling = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    prompts = [
        [2 + (7 * place + 11 * length) % 300 for place in range(length)] for length in lengths
    ]
    for number, prompt in enumerate(prompts):
        one = TokenizedRequest(str(number), tuple(prompt), sampling, Assignment(key=None))
        engine.add(one, None)
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for chunk in engine.step():
            assert not isinstance(chunk, Failure)
            found.setdefault(chunk.request_id, []).extend(chunk.tokens)
    model = load_causal_lm(folder, torch.float32, "cpu")
    for number, prompt in enumerate(prompts):
        text = list(prompt)
        while len(text) < len(prompt) + count:
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        assert found[str(number)] == text[len(prompt) :]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        Lfm2Config(**LLAMA_LIKE, layer_types=["conv", "full_attention"]),
        GPTJConfig(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=256, rotary_dim=4),
        StableLmConfig(**LLAMA_LIKE),
    ],
    ids=lambda config: config.model_type,
)
def test_what_keeps_more_than_keys_and_values_or_attends_by_itself_is_refused(
    save: Save, config: PretrainedConfig, dtype: str
) -> None:
    with pytest.raises(ModelError, match="serve it with vLLM"):
        build_engine(save(config), settings(dtype=dtype))


@pytest.mark.parametrize(
    "config",
    [
        Gemma3TextConfig(**LLAMA_LIKE, **WINDOWS, head_dim=8),
        MistralConfig(**LLAMA_LIKE, sliding_window=5),
    ],
    ids=lambda config: config.model_type,
)
def test_short_windows_are_served(save: Save, config: PretrainedConfig) -> None:
    assert_served(save(config), settings(), [3, 30, 60, 1], 12)


@pytest.mark.parametrize(("block_size", "tokens"), [(16, 16), (1, 1), (1, 3), (4, 12)])
def test_a_model_is_tried_in_the_smallest_cache(save: Save, block_size: int, tokens: int) -> None:
    small = {"block_size": block_size, "kv_cache_tokens": tokens, "max_context": tokens}
    folder = save(LlamaConfig(**LLAMA_LIKE))
    assert_served(folder, settings(**small), [1] if tokens == 1 else [2], min(1, tokens - 1))


def test_longrope_is_served_within_its_first_context_only(save: Save) -> None:
    folder = save(Phi3Config(**LLAMA_LIKE, rope_parameters={**LONGROPE}, **ORIGINAL))
    for beyond in (None, 65):
        with pytest.raises(ModelError, match=r"longrope.*engine\.max_context to at most 64"):
            build_engine(folder, settings(max_context=beyond))
    assert_served(folder, settings(max_context=64), [3, 30, 54, 1], 10)


def test_dynamic_rope_is_served_within_the_context_that_it_begins_with(save: Save) -> None:
    small = {**LLAMA_LIKE, "max_position_embeddings": 64}
    folder = save(LlamaConfig(**small, rope_parameters={**DYNAMIC}))
    assert_served(folder, settings(), [3, 30, 54, 1], 10)


def test_frequencies_that_change_are_found_wherever_they_are() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    layers = {"sliding_attention": plain, "full_attention": {**DYNAMIC}}
    mixed = Gemma3TextConfig(**LLAMA_LIKE, **WINDOWS, head_dim=8, rope_parameters=layers)
    for config in (LlamaConfig(**LLAMA_LIKE, rope_parameters={**DYNAMIC}), mixed):
        check_rope(config, 256)
        with pytest.raises(ModelError, match=r"dynamic.*at most 256"):
            check_rope(config, 257)
    check_rope(LlamaConfig(**LLAMA_LIKE), 10**6)
