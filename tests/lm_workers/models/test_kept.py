"""What transformers says of a model is asked once, and later starts do without its classes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from serving_bench.prepare import write_bundle
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from adapter_gen.bundle import Bundle
from cluster_router.wire.errors import ModelError
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import load_tokenizer
from lm_workers.models.config import load_config
from lm_workers.models.kept import KeptAnswer, KeptFile

LIGHT = """
import sys
from pathlib import Path
from adapter_gen.bundle import Bundle
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import load_tokenizer
from lm_workers.models.config import load_config

path = Path(sys.argv[1])
load_tokenizer(path), load_config(path)
if len(sys.argv) > 2:
    build_engine(path, EngineConfig(dtype="float32", device="cpu", cpu_threads=1))
    Bundle.load(Path(sys.argv[2]), None)
heavy = ("sympy", "scipy", "torch._dynamo", "transformers.modeling_utils")
print(*(name for name in heavy if name in sys.modules))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every question to transformers."""
    found: list[str] = []

    def noting(kind: type) -> Callable[..., object]:
        ask = kind.from_pretrained  # type: ignore[attr-defined]

        def answer(*args: object, **options: object) -> object:
            found.append(kind.__name__)
            return ask(*args, **options)

        return answer

    for kind in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", noting(kind))
    return found


def copy(path: Path, target: Path) -> Path:
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def imported(*words: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *map(str, words)],
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    return done.stdout.split()


def test_a_later_start_imports_no_compiler_and_no_model_class(
    default_model: Path, bundle_path: Path, cache: Path
) -> None:
    assert "transformers.modeling_utils" in imported(default_model, bundle_path)
    assert imported(default_model, bundle_path) == []


def test_loading_a_hypernetwork_of_cores_imports_no_compiler(
    tiny_llama: Path, tmp_path: Path, cache: Path
) -> None:
    write_bundle(tiny_llama, tmp_path / "bundle", "full", 4, 2)
    assert Bundle.load(tmp_path / "bundle", None).spec.rank == 4
    imported(tiny_llama, tmp_path / "bundle")  # the first start
    assert imported(tiny_llama, tmp_path / "bundle") == []


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_kept_config_says_what_transformers_does(
    tiny_checkpoints: dict[str, Path], cache: Path, asked: list[str], family: str
) -> None:
    path = tiny_checkpoints[family]
    first, second = load_config(path), load_config(path)
    assert asked == ["AutoConfig"]
    expected = AutoConfig.from_pretrained(path)
    for config in (first, second):
        assert config.model_type == family
        for name, value in expected.to_dict().items():
            if name not in ("transformers_version", "use_cache"):  # of how it was written, and used
                assert getattr(config, name) == getattr(expected, name), (name, value)
    assert first.to_dict() == second.to_dict()


def test_configs_of_other_families_are_transformers_own(
    tiny_checkpoints: dict[str, Path], cache: Path, asked: list[str]
) -> None:
    for _ in range(2):
        assert type(load_config(tiny_checkpoints["gpt2"])) is transformers.GPT2Config
    assert asked == ["AutoConfig"] * 2


def same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return (
        type(one) is type(other)
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
        and one.special_tokens_map == other.special_tokens_map
        and one.chat_template == other.chat_template
        and one.padding_side == other.padding_side
        and one.model_max_length == other.model_max_length
        and one("A cat, 1234  and Ünïcode 🙂").input_ids
        == other("A cat, 1234  and Ünïcode 🙂").input_ids
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "default"])
def test_a_kept_class_gives_the_same_tokenizer(
    tiny_checkpoints: dict[str, Path],
    default_model: Path,
    cache: Path,
    asked: list[str],
    family: str,
) -> None:
    path = default_model if family == "default" else tiny_checkpoints[family]
    first = load_tokenizer(path)
    assert asked.count("AutoTokenizer") == 1
    assert same(load_tokenizer(path), first)
    assert asked.count("AutoTokenizer") == 1
    assert same(AutoTokenizer.from_pretrained(path), first)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "more.txt"])
def test_another_folder_is_asked_about_again(
    tiny_llama: Path, tmp_path: Path, cache: Path, asked: list[str], name: str
) -> None:
    path = copy(tiny_llama, tmp_path / "model")
    load_tokenizer(path)
    asked.clear()
    file = path / name
    if file.exists():
        file.write_text(json.dumps({**json.loads(file.read_text()), "one_more": 1}))
    else:
        file.write_text("")
    load_tokenizer(path)
    assert "AutoTokenizer" in asked
    assert load_config(path).hidden_size == load_config(tiny_llama).hidden_size


def test_a_config_of_the_same_size_is_another(
    tiny_llama: Path, tmp_path: Path, cache: Path, asked: list[str]
) -> None:
    path = copy(tiny_llama, tmp_path / "model")
    file = path / "config.json"
    assert load_config(path).rms_norm_eps == 1e-6
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'))
    assert load_config(path).rms_norm_eps == 2e-6


@pytest.mark.parametrize("content", ["", "[1", '"no such class"', '"AutoTokenizer"', "7"])
def test_a_file_of_no_use_is_replaced(
    tiny_llama: Path, cache: Path, asked: list[str], content: str
) -> None:
    first, config = load_tokenizer(tiny_llama), load_config(tiny_llama)
    kept = [one for kind in ("tokenizers", "configs") for one in (cache / kind).iterdir()]
    assert len(kept) == 2
    whole = [one.read_text() for one in kept]
    for one in kept:
        one.write_text(content)
    asked.clear()
    assert same(load_tokenizer(tiny_llama), first)
    assert load_config(tiny_llama).to_dict() == config.to_dict()
    assert {"AutoTokenizer", "AutoConfig"} <= set(asked)
    assert [one.read_text() for one in kept] == whole


def test_a_cache_that_cannot_be_written_is_none(
    tiny_llama: Path, cache: Path, asked: list[str]
) -> None:
    cache.write_text("a file where the folder should be")
    for _ in range(2):
        asked.clear()
        load_tokenizer(tiny_llama)
        assert isinstance(load_config(tiny_llama), PretrainedConfig)
        assert {"AutoTokenizer", "AutoConfig"} <= set(asked)


def test_what_is_kept_does_not_stand_for_a_folder_that_is_gone(
    tiny_llama: Path, tmp_path: Path, cache: Path
) -> None:
    path = copy(tiny_llama, tmp_path / "model")
    load_tokenizer(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(path)
    with pytest.raises(ModelError, match=r"config in .* cannot be read"):
        load_config(tmp_path / "nothing here")


def test_all_that_is_kept_can_be_read_by_those_who_share_the_cache(
    tiny_llama: Path, cache: Path
) -> None:
    build_engine(tiny_llama, EngineConfig(dtype="float32", device="cpu", cpu_threads=1))
    (cache / "plain").write_text("")
    kinds = ("configs", "tokenizers", "logits")
    modes = {one.stat().st_mode for kind in kinds for one in (cache / kind).iterdir()}
    assert modes == {(cache / "plain").stat().st_mode}


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    file = KeptFile("kind", "name.json", tmp_path)

    def broken(path: Path) -> None:
        path.write_text("half of")
        raise OSError("no space left")

    file.write(broken)
    assert list((tmp_path / "kind").iterdir()) == []
    file.write(lambda path: path.write_text("all of it"))
    assert file.path.read_text() == "all of it"
    file.write(broken)
    assert file.path.read_text() == "all of it"
    file.forget()
    file.forget()
    assert list((tmp_path / "kind").iterdir()) == []


def test_another_version_of_transformers_is_asked_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KeptAnswer("question", tiny_llama, tmp_path).keep([1, "two"])
    assert KeptAnswer("question", tiny_llama, tmp_path).read() == [1, "two"]
    assert KeptAnswer("another", tiny_llama, tmp_path).read() is None
    monkeypatch.setattr("lm_workers.models.kept.transformers.__version__", "99.0")
    assert KeptAnswer("question", tiny_llama, tmp_path).read() is None
