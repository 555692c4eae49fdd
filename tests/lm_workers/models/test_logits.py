"""Transformers' logits for a few texts, kept from one start of a model to the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster_router.wire.errors import ModelError
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import fingerprint, load_causal_lm
from lm_workers.models.config import load_config
from lm_workers.models.logits import KeptLogits, compute_logits, widened

CONFIG = EngineConfig(dtype="float32", device="cpu", cpu_threads=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, whose `logits` folder is given."""
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "logits"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every model that an engine has transformers load."""
    found: list[Path] = []

    def noting(path: Path, dtype: object, device: str) -> object:
        found.append(path)
        return load_causal_lm(path, dtype, device)  # type: ignore[arg-type]

    monkeypatch.setattr("lm_workers.build.load_causal_lm", noting)
    return found


def kept(path: Path, dtype: torch.dtype = torch.float32) -> KeptLogits:
    return KeptLogits(fingerprint(path), load_config(path), dtype, "cpu")


def copy(path: Path, target: Path) -> Path:
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_only_the_first_start_has_transformers_load_the_model(
    tiny_llama: Path, cache: Path, loads: list[Path]
) -> None:
    build_engine(tiny_llama, CONFIG)
    assert loads == [tiny_llama]
    [file] = cache.iterdir()
    assert file.name.startswith(fingerprint(tiny_llama))
    build_engine(tiny_llama, CONFIG)
    assert loads == [tiny_llama]
    assert list(cache.iterdir()) == [file]


def test_what_is_kept_is_what_transformers_gives(tiny_llama: Path, cache: Path) -> None:
    model = load_causal_lm(tiny_llama, torch.float32, "cpu")
    first = kept(tiny_llama).get(lambda: model)
    assert first.tokens.unique().numel() == first.tokens.numel(), "texts of different tokens"
    assert torch.equal(first.logits, model(first.tokens, use_cache=False).logits)

    def never() -> object:
        raise AssertionError("they are kept")

    second = kept(tiny_llama).get(never)  # type: ignore[arg-type]
    assert torch.equal(second.tokens, first.tokens)
    assert torch.equal(second.logits, first.logits)


def test_another_dtype_or_config_has_its_own(
    tiny_llama: Path, tmp_path: Path, cache: Path, loads: list[Path]
) -> None:
    build_engine(tiny_llama, CONFIG)
    build_engine(tiny_llama, CONFIG.model_copy(update={"dtype": "bfloat16"}))
    other = copy(tiny_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    assert fingerprint(other) == fingerprint(tiny_llama)
    build_engine(other, CONFIG)
    assert loads == [tiny_llama, tiny_llama, other]
    assert len(list(cache.iterdir())) == 3


def test_where_the_cache_cannot_be_written_they_are_computed_each_time(
    tiny_llama: Path, cache: Path, loads: list[Path]
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    for count in (1, 2):
        build_engine(tiny_llama, CONFIG)
        assert len(loads) == count


@pytest.mark.parametrize("damage", ["cut", "shape", "name"])
def test_a_damaged_file_is_replaced(
    tiny_llama: Path, cache: Path, loads: list[Path], damage: str
) -> None:
    build_engine(tiny_llama, CONFIG)
    [file] = cache.iterdir()
    whole = load_file(file)["logits"].clone()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        name = "other" if damage == "name" else "logits"
        save_file({name: whole[:, :, :-1].contiguous()}, file)
    build_engine(tiny_llama, CONFIG)
    assert len(loads) == 2
    assert torch.equal(load_file(file)["logits"], whole)


def test_kept_ones_that_differ_are_forgotten_with_the_refusal(
    tiny_llama: Path, cache: Path, loads: list[Path]
) -> None:
    build_engine(tiny_llama, CONFIG)
    [file] = cache.iterdir()
    save_file({"logits": load_file(file)["logits"] + 1}, file)
    with pytest.raises(ModelError, match="logits differ between transformers and the engine"):
        build_engine(tiny_llama, CONFIG)
    assert not file.exists()
    build_engine(tiny_llama, CONFIG)
    assert len(loads) == 2


def test_models_of_other_families_are_compared_each_time(
    tiny_checkpoints: dict[str, Path], cache: Path, loads: list[Path]
) -> None:
    for _ in range(2):
        build_engine(tiny_checkpoints["gpt2"], CONFIG)
    assert len(loads) == 2
    assert not cache.exists()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_narrow_matrices_are_computed_with_in_the_wider_dtype(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, family: str
) -> None:
    path = copy(tiny_checkpoints[family], tmp_path / "narrow")
    load_causal_lm(path, torch.bfloat16, "cpu").save_pretrained(path)
    expected = compute_logits(load_causal_lm(path, torch.float32, "cpu"))
    narrow = load_causal_lm(path, "auto", "cpu")
    assert narrow.dtype == torch.bfloat16
    found = compute_logits(widened(narrow, torch.float32))
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.logits, expected.logits)
