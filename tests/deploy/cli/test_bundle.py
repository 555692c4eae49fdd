"""Looking into bundles, checking and exporting them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft import PeftConfig

from lm_workers.models import DEFAULT_MODEL, load_tokenizer


def test_inspect(chameleon) -> None:
    found = json.loads(chameleon("bundle", "inspect", DEFAULT_MODEL, "--json").stdout)
    assert found["base_model"] == DEFAULT_MODEL and found["depth"] == "full"
    assert len(found["clusters"]) == 32
    assert sum(one["size"] for one in found["clusters"]) == found["prompts"]
    shown = chameleon("bundle", "inspect", DEFAULT_MODEL).stdout
    assert found["fingerprint"] in shown and "hypernetwork.safetensors" in shown


def test_a_sound_bundle_is_verified(chameleon, default_model: Path) -> None:
    result = chameleon("bundle", "verify", DEFAULT_MODEL, "--json")
    assert result.exit_code == 0
    checks = json.loads(result.stdout)
    assert [one["ok"] for one in checks] == [True] * 4
    assert "32 clusters" in checks[-1]["found"]


def test_a_damaged_bundle_is_not(chameleon, bundle_path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle_path, copy)
    file = copy / "bases.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = chameleon("bundle", "verify", copy)
    assert result.exit_code == 1
    assert "FAIL files" in result.stdout and "bases.safetensors" in result.stdout


def test_another_base_model_is_refused(chameleon, tiny_llama: Path) -> None:
    result = chameleon("bundle", "verify", DEFAULT_MODEL, "--model", tiny_llama)
    assert result.exit_code == 1
    assert "FAIL base model" in result.stdout and "choose the bundle" in result.stdout


def test_export(chameleon, default_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    result = chameleon("bundle", "export", DEFAULT_MODEL, 3, "--out", out, "--json")
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)["files"]) == {path.name for path in out.iterdir()}
    config = PeftConfig.from_pretrained(str(out))
    assert config.r == 16
    assert config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "quantised to 4 bits" in (out / "README.md").read_text()
    again = chameleon("bundle", "export", DEFAULT_MODEL, 3, "--out", out)
    assert again.exit_code == 2 and "name another folder" in again.stderr
    other = chameleon("bundle", "export", DEFAULT_MODEL, 99, "--out", tmp_path / "other")
    assert other.exit_code == 2 and "from 0 to 31" in other.stderr
    assert not (tmp_path / "other").exists()


def test_a_bundle_that_is_not_there(chameleon) -> None:
    result = chameleon("bundle", "inspect", "nothing")
    assert result.exit_code == 2 and DEFAULT_MODEL in result.stderr


def test_fetched_models_can_be_loaded(chameleon, default_model: Path) -> None:
    folder = chameleon("model", "fetch").stdout.strip()
    assert Path(folder) == default_model
    assert len(load_tokenizer(Path(folder))) > 1000
    facts = json.loads(chameleon("model", "fetch", folder, "--json").stdout)
    assert facts["context_length"] == 8192 and len(facts["fingerprint"]) == 16


def test_a_model_that_is_not_there(chameleon) -> None:
    result = chameleon("model", "fetch", "./nowhere")
    assert result.exit_code == 2 and "give a folder" in result.stderr
