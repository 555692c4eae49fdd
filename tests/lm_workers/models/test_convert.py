from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from cluster_router.wire.errors import ModelError
from lm_workers.models import load_causal_lm, load_tokenizer
from lm_workers.models.convert import convert_gguf
from lm_workers.models.weights import check_folder, read_json

TEXT = "The quick Paris</s> is \n 2024"


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_gguf(tiny_gguf, tmp_path_factory.mktemp("models") / "tiny", "From a test.")


def test_weights_survive_to_the_bit(converted: Path, tiny_checkpoints: dict[str, Path]) -> None:
    before = load_causal_lm(tiny_checkpoints["llama"], torch.float32, "cpu").state_dict()
    after = load_causal_lm(converted, torch.float32, "cpu").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tokenizer_survives(converted: Path, tiny_checkpoints: dict[str, Path]) -> None:
    before, after = load_tokenizer(tiny_checkpoints["llama"]), load_tokenizer(converted)
    chat = [{"role": "user", "content": TEXT}]
    assert after(TEXT).input_ids == before(TEXT).input_ids
    assert after.apply_chat_template(chat) == before.apply_chat_template(chat)
    assert (after.bos_token, after.eos_token) == ("<s>", "</s>")
    assert after("<|endoftext|>").input_ids == before("<|endoftext|>").input_ids


def test_digits_stand_alone_where_the_model_learned_it_so(
    converted: Path, digits_gguf: Path, tmp_path: Path
) -> None:
    digits = load_tokenizer(convert_gguf(digits_gguf, tmp_path / "digits", ""))
    assert pieces(digits, "x   12") == ["x", "ĠĠĠ", "1", "2"]
    assert pieces(load_tokenizer(converted), "x   12") == ["x", "ĠĠ", "Ġ12"]


def pieces(tokenizer: Any, text: str) -> list[str]:
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [piece for piece, _ in split]


def test_folder_is_plain_and_shared(converted: Path) -> None:
    check_folder(converted)
    config = read_json(converted / "config.json")
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (converted / "NOTICE").read_text() == "From a test.\n"
    modes = {file.stat().st_mode for file in converted.iterdir()}
    assert len(modes) == 1


def test_output_stays_clean(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert_gguf(tiny_gguf, tmp_path / "quiet", "")
    load_causal_lm(tmp_path / "quiet", torch.float32, "cpu")
    assert capfd.readouterr() == ("", "")


def test_leftovers_of_a_killed_process_are_replaced(tiny_gguf: Path, tmp_path: Path) -> None:
    scratch = tmp_path / ".tiny.partial"
    scratch.mkdir()
    (scratch / "stray").touch()
    folder = convert_gguf(tiny_gguf, tmp_path / "tiny", "")
    assert not scratch.exists()
    assert not (folder / "stray").exists()


@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_truncated(tiny_gguf: Path, tmp_path: Path, keep: float) -> None:
    content = tiny_gguf.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be converted"):
        convert_gguf(broken, tmp_path / "out", "")
    assert [p.name for p in tmp_path.iterdir()] == ["broken.gguf"]


def test_not_gguf(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        convert_gguf(other, tmp_path / "out", "")


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture"):
        convert_gguf(path, tmp_path / "out", "")


@pytest.mark.parametrize("spoil", ["missing", "nan"])
def test_missing_or_broken_weights(tiny_gguf: Path, tmp_path: Path, spoil: str) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    if spoil == "missing":
        # A name nobody asks for hides the tensor.
        position = content.index(b"blk.1.ffn_up")
        content[position : position + 12] = b"blk.1.ffn_xx"
    else:
        content[-4:] = np.array([np.nan], np.float32).tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    message = "lacks 1 weights" if spoil == "missing" else "holds NaN"
    with pytest.raises(ModelError, match=message):
        convert_gguf(broken, tmp_path / "out", "")
