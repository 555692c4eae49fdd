from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster_router.wire.errors import ConfigError, ModelError
from lm_workers.models import (
    auto_dtype,
    load_causal_lm,
    load_embedding,
    load_tokenizer,
    resolve_dtype,
)
from lm_workers.models.weights import check_folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_frozen_and_right(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    model = load_causal_lm(tiny_checkpoint, dtype, "cpu")
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=dtype).eval()
    tokens = torch.tensor([[5, 9, 200, 3]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(tokens).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_embedding_is_the_models(tiny_checkpoint: Path) -> None:
    model = load_causal_lm(tiny_checkpoint, torch.float32, "cpu")
    embedding = load_embedding(tiny_checkpoint)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    assert load_embedding(tiny_checkpoint, torch.bfloat16).dtype == torch.bfloat16


def test_sharded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = reshard(tiny_checkpoint, tmp_path / "sharded")
    whole = load_causal_lm(tiny_checkpoint, torch.float32, "cpu").state_dict()
    parts = load_causal_lm(folder, torch.float32, "cpu").state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert torch.equal(load_embedding(folder), load_embedding(tiny_checkpoint))


def reshard(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(target, max_shard_size="20KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


def test_gpt2_without_the_outer_prefix(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = bare_gpt2(tiny_checkpoints["gpt2"], tmp_path / "bare")
    whole = load_causal_lm(tiny_checkpoints["gpt2"], torch.float32, "cpu").state_dict()
    bare = load_causal_lm(folder, torch.float32, "cpu").state_dict()
    assert all(torch.equal(whole[name], bare[name]) for name in whole)
    assert torch.equal(load_embedding(folder), load_embedding(tiny_checkpoints["gpt2"]))


def bare_gpt2(folder: Path, target: Path) -> Path:
    """As the original GPT-2 is stored: no `transformer.`, and a causal mask beside the weights."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    save_file(bare, target / "model.safetensors", {"format": "pt"})
    return target


def spoil(folder: Path, name: str, value: float | None) -> None:
    weights = load_file(folder / "model.safetensors")
    if value is None:
        del weights[name]
    else:
        weights[name].view(-1)[7] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(llama: Path, value: float) -> None:
    spoil(llama, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(ModelError, match=r"model\.safetensors holds NaN .*layers\.1\.mlp\.up_proj"):
        load_causal_lm(llama, torch.float32, "cpu")
    spoil(llama, "model.embed_tokens.weight", value)
    with pytest.raises(ModelError, match=r"model\.safetensors holds NaN .* model\.embed_tokens"):
        load_embedding(llama)


def test_overflow_in_a_narrow_dtype(llama: Path) -> None:
    spoil(llama, "model.norm.weight", 1e6)
    assert load_causal_lm(llama, torch.float32, "cpu")
    with pytest.raises(ModelError, match=r"as torch\.float16"):
        load_causal_lm(llama, torch.float16, "cpu")


def test_missing_weight_is_never_made_up(llama: Path) -> None:
    spoil(llama, "model.layers.0.self_attn.q_proj.weight", None)
    with pytest.raises(ModelError, match=r"lacks 1 weights, among them .*q_proj"):
        load_causal_lm(llama, torch.float32, "cpu")


def test_shapes_that_do_not_fit_the_config(llama: Path) -> None:
    edit_config(llama, intermediate_size=48)
    with pytest.raises(ModelError, match="cannot be loaded as a language model"):
        load_causal_lm(llama, torch.float32, "cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no-such-type"},
        {"hidden_size": "many"},
        {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Model"}},
    ],
)
def test_configs_that_cannot_be_served(llama: Path, change: dict[str, object]) -> None:
    (llama / "own.py").write_text("raise SystemExit('code from a model folder was run')")
    edit_config(llama, **change)
    with pytest.raises(ModelError):
        load_causal_lm(llama, torch.float32, "cpu")


def test_quantised_weights_are_for_the_other_engine(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "awq"})
    assert check_folder(llama) == llama
    with pytest.raises(ModelError, match=r"quantised weights.*backend: vllm"):
        load_causal_lm(llama, torch.float32, "cpu")


def edit_config(folder: Path, **change: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


def test_pickle_is_not_loaded_beside_safetensors(llama: Path) -> None:
    (llama / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load_causal_lm(llama, torch.float32, "cpu")


def test_no_embedding_under_a_known_name(llama: Path) -> None:
    save_file({"odd.weight": torch.zeros(4, 4)}, llama / "model.safetensors")
    with pytest.raises(ModelError, match=r"no input embedding .* among odd\.weight"):
        load_embedding(llama)


def test_tokenizer(tiny_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint)
    text = "Paris is é\n 日本 </s>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_broken_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Odd"}}')
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(llama)


def test_dtypes() -> None:
    assert resolve_dtype("float16", "cpu") == torch.float16
    assert resolve_dtype("auto", "cpu") == auto_dtype("cpu")
    assert auto_dtype("cpu") in {torch.float32, torch.bfloat16}
    assert auto_dtype("meta") == torch.float32
    with pytest.raises(ConfigError, match="dtype must be auto, float32"):
        resolve_dtype("int8", "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tiny_checkpoint: Path) -> None:
    model = load_causal_lm(tiny_checkpoint, auto_dtype("cuda"), "cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert torch.isfinite(model(torch.tensor([[5, 9]], device="cuda")).logits).all()
