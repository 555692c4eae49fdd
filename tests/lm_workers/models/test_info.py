from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster_router.wire.errors import ModelError
from lm_workers.models import describe_model, fingerprint


def test_description(tiny_checkpoint: Path) -> None:
    info = describe_model(tiny_checkpoint, "tiny")
    assert (info.name, info.context_length, info.vocab_size) == ("tiny", 128, 320)
    assert (info.hidden_size, info.eos_token_ids) == (32, (1,))
    assert info.fingerprint == fingerprint(tiny_checkpoint)


def test_every_source_of_eos_counts(llama: Path) -> None:
    edit(llama / "config.json", eos_token_id=[2, 3])
    edit(llama / "generation_config.json", eos_token_id=5)
    assert describe_model(llama, "tiny").eos_token_ids == (1, 2, 3, 5)
    (llama / "generation_config.json").unlink()
    edit(llama / "config.json", eos_token_id=None)
    assert describe_model(llama, "tiny").eos_token_ids == (1,)


def edit(file: Path, **change: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


def test_tokenizer_of_another_model(llama: Path) -> None:
    edit(llama / "config.json", vocab_size=300)
    with pytest.raises(ModelError, match="put the model's own tokenizer there"):
        describe_model(llama, "tiny")


def test_fingerprint_ignores_how_the_model_is_stored(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    model.float().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert fingerprint(tmp_path / "bf16") == fingerprint(tiny_checkpoint)
    assert fingerprint(tmp_path / "shards") == fingerprint(tiny_checkpoint)


def test_fingerprint_ignores_names_buffers_and_a_repeated_head(
    tiny_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoints["gpt2"], tmp_path / "bare"))
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    assert fingerprint(folder) == fingerprint(tiny_checkpoints["gpt2"])


@pytest.mark.parametrize("part", ["embed_tokens", "0.self_attn.v_proj", "1.mlp.down_proj", "norm"])
def test_a_finetune_is_another_model(llama: Path, part: str) -> None:
    before = fingerprint(llama)
    weights = load_file(llama / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith(f"{part}.weight"))
    weights[name] = weights[name] * 1.02
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    assert fingerprint(llama) != before


def test_families_differ(tiny_checkpoints: dict[str, Path]) -> None:
    ids = {fingerprint(folder) for folder in tiny_checkpoints.values()}
    assert len(ids) == len(tiny_checkpoints)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in ids)


def test_config_that_cannot_be_read(llama: Path) -> None:
    edit(llama / "config.json", model_type="no-such-type")
    with pytest.raises(ModelError, match=r"the config in .* cannot be read"):
        describe_model(llama, "tiny")


def test_context_length_must_be_known(llama: Path) -> None:
    config = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}
    (llama / "config.json").write_text(json.dumps({**config, "vocab_size": 320}))
    with pytest.raises(ModelError, match="sets no max_position_embeddings"):
        describe_model(llama, "tiny")
