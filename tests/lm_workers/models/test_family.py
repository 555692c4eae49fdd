"""Models of the Llama family without transformers' classes: the same weights under the same names,
and the same refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from cluster_router.wire.errors import ModelError
from lm_workers.models import load_causal_lm
from lm_workers.models.config import is_family, load_config
from lm_workers.models.family import FamilyModel, load_family
from lm_workers.models.rope import RotaryEmbedding

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WINDOWS: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, head_dim": LlamaConfig(**SIZES, head_dim=12, rms_norm_eps=1e-4),
    "mistral": MistralConfig(**SIZES),
    "mistral, windows": MistralConfig(**SIZES, sliding_window=5, head_dim=12),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows": Qwen2Config(**SIZES, **WINDOWS),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3, biases": Qwen3Config(**SIZES, **WINDOWS, attention_bias=True),
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 3e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

Save = Callable[[PretrainedConfig], Path]
State = dict[str, torch.Tensor]


@pytest.fixture
def save(save_drawn: Callable[..., Path]) -> Save:
    """Save a model of a config, whose every weight is random."""
    return lambda config: save_drawn(config, torch.nn.init.normal_)


def load(
    path: Path, dtype: torch.dtype = torch.float32, as_stored: bool = False, device: str = "cpu"
) -> FamilyModel:
    return load_family(path, load_config(path), dtype, device, as_stored)


def rewrite(path: Path, change: Callable[[State], State]) -> None:
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", CONFIGS)
def test_it_holds_what_transformers_holds(save: Save, name: str) -> None:
    path = save(CONFIGS[name])
    expected, found = load_causal_lm(path, torch.float32, "cpu"), load(path)
    weights = dict(found.named_parameters())
    assert weights.keys() == dict(expected.named_parameters()).keys()
    for key, weight in expected.named_parameters():
        assert torch.equal(weights[key], weight), key
        assert not weights[key].requires_grad
    tied = expected.lm_head.weight is expected.get_input_embeddings().weight
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied
    for ours, theirs in zip(found.model.layers, expected.model.layers, strict=True):
        attention = theirs.self_attn
        assert ours.self_attn.scaling == attention.scaling
        assert ours.index == attention.layer_idx
        assert ours.input_layernorm.eps == theirs.input_layernorm.variance_epsilon
        if name.startswith("mistral"):  # whose mask is made of the config alone
            assert ours.self_attn.window == expected.config.sliding_window
        else:
            assert ours.self_attn.window == getattr(attention, "sliding_window", None)


def test_windows_are_among_what_was_compared() -> None:
    kinds = {tuple(config.layer_types) for config in CONFIGS.values() if "layer_types" in config}
    assert any(len(set(one)) == 2 for one in kinds)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_embeddings_are_transformers_own(save: Save, kind: str, dtype: torch.dtype) -> None:
    config = LlamaConfig(**SIZES, head_dim=12, rope_parameters=dict(ROPES[kind]))
    model = AutoModelForCausalLM.from_config(config)
    positions = torch.tensor([[0, 1, 2, 63, 64, 100, 255]])
    expected = model.model.rotary_emb(torch.empty(1, dtype=dtype), positions)
    found = RotaryEmbedding(config, torch.device("cpu"))(positions, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_as_stored_leaves_the_matrices_alone(save: Save, stored: torch.dtype, family: str) -> None:
    path = save(CONFIGS[family])
    rewrite(path, lambda state: {name: one.to(stored) for name, one in state.items()})
    whole = dict(load(path).named_parameters())
    for name, weight in load(path, as_stored=True).named_parameters():
        assert weight.dtype == (stored if weight.dim() == 2 else torch.float32)
        assert torch.equal(weight.float(), whole[name])


def test_a_body_that_was_saved_alone_is_found_by_its_names(save: Save) -> None:
    path = save(CONFIGS["llama, tied"])
    expected = dict(load(path).named_parameters())
    rewrite(path, lambda state: {name.removeprefix("model."): one for name, one in state.items()})
    for name, weight in load(path).named_parameters():
        assert torch.equal(weight, expected[name])


def test_a_head_beside_a_tied_embedding_is_its_own_only_if_it_differs(save: Save) -> None:
    path = save(CONFIGS["llama, tied"])
    embedding = load(path).get_input_embeddings().weight
    rewrite(path, lambda state: {**state, "lm_head.weight": embedding.clone()})
    same = load(path)
    assert same.lm_head.weight is same.get_input_embeddings().weight
    rewrite(path, lambda state: {**state, "lm_head.weight": embedding + 1})
    other = load(path)
    assert torch.equal(other.lm_head.weight, embedding + 1)
    assert torch.equal(other.get_input_embeddings().weight, embedding)
    assert torch.equal(load_causal_lm(path, torch.float32, "cpu").lm_head.weight, embedding + 1)
    rewrite(
        path,
        lambda state: {
            name: one for name, one in state.items() if name != "model.embed_tokens.weight"
        },
    )
    alone = load(path)
    assert torch.equal(alone.get_input_embeddings().weight, embedding + 1)
    assert alone.lm_head.weight is alone.get_input_embeddings().weight


def test_what_is_stored_besides_is_not_read(save: Save) -> None:
    path = save(CONFIGS["llama"])
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), torch.nan)}
    rewrite(path, lambda state: {**state, **more})
    assert more.keys().isdisjoint(dict(load(path).named_parameters()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: {key: one for key, one in state.items() if "layers.1.mlp.up" not in key},
            "lacks 1 weights, among them model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda state: {key: one for key, one in state.items() if key != "lm_head.weight"},
            "lacks 1 weights, among them lm_head.weight",
        ),
        (
            lambda state: {**state, "model.norm.weight": torch.ones(31)},
            r"model\.norm\.weight as \[31\].* says \[32\]",
        ),
        (
            lambda state: {**state, "model.norm.weight": torch.full((32,), torch.inf)},
            r"model\.safetensors holds NaN or infinity in model\.norm\.weight",
        ),
    ],
    ids=["a weight missing", "the head missing", "another shape", "infinity"],
)
def test_damaged_models_are_refused(save: Save, change: Any, said: str) -> None:
    path = save(CONFIGS["llama"])
    rewrite(path, change)
    with pytest.raises(ModelError, match=said):
        load(path)


def test_numbers_too_large_for_the_dtype_are_refused(save: Save) -> None:
    path = save(CONFIGS["llama"])
    rewrite(path, lambda state: {**state, "model.norm.weight": torch.full((32,), 1e6)})
    with pytest.raises(ModelError, match=r"as torch\.float16.*a dtype with a wider range"):
        load(path, torch.float16)


def test_other_models_are_not_of_the_family() -> None:
    assert is_family(CONFIGS["qwen2"])
    assert not is_family(LlamaConfig(**SIZES, hidden_act="gelu"))
    assert not is_family(PretrainedConfig())


@pytest.mark.gpu
def test_on_a_gpu_it_holds_the_same(save: Save) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = save(CONFIGS["qwen3"])
    found = load(path, torch.bfloat16, device="cuda")
    for name, weight in load(path, torch.bfloat16).named_parameters():
        there = found.get_parameter(name)
        assert there.is_cuda
        assert torch.equal(there.cpu(), weight)
