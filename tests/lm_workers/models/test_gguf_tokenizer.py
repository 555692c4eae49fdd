"""Whatever transformers makes of a GGUF's tokenizer, what is saved is what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lm_workers.models import load_tokenizer
from lm_workers.models.gguf_tokenizer import save_gguf_tokenizer
from lm_workers.models.weights import read_json

# The last three are the bytes of U+2581, which stands for a space in SentencePiece.
TOKENS = ["<s>", "</s>", "<｜user｜>", "<think>", "<pad>", "a", "b", "ab", "Ġ", "â", "ĸ", "ģ"]
TYPES = [3, 3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1]


def write_fields(
    path: Path, model: str, add_bos: bool | None = None, pre: str | None = None
) -> Path:
    """A GGUF that holds a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(4)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def misread(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes the file for SentencePiece, bos for eos, and invents a token."""
    vocab = {token: index for index, token in enumerate(TOKENS)}
    backend = Tokenizer(
        BPE(vocab, [("a", "b")], unk_token="<s>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteLevel()])

    original = AutoTokenizer.from_pretrained

    def read(*args: Any, **settings: Any) -> PreTrainedTokenizerBase:
        if "gguf_file" not in settings:
            return original(*args, **settings)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="<s>",
            eos_token_id=0,
            unk_token="<invented>",
            clean_up_tokenization_spaces=True,
        )

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)


def saved(
    tmp_path: Path, model: str, add_bos: bool | None = None, pre: str | None = None
) -> PreTrainedTokenizerBase:
    save_gguf_tokenizer(write_fields(tmp_path / "some.gguf", model, add_bos, pre), tmp_path)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_special_tokens_are_those_of_the_file(tmp_path: Path, model: str) -> None:
    tokenizer = saved(tmp_path, model)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 4)
    assert tokenizer.unk_token is None
    assert "eos_token_id" not in read_json(tmp_path / "tokenizer_config.json")
    assert len(tokenizer) == len(TOKENS)


def test_byte_level_pieces_and_text(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, "gpt2")
    assert tokenizer("ab▁").input_ids == [7, 9, 10, 11]
    assert tokenizer.decode([7, 9, 10, 11]) == "ab▁"
    assert tokenizer.decode([5, 8, 8, 6]) == "a  b"
    assert tokenizer("A").input_ids == []
    model = read_json(tmp_path / "tokenizer.json")["model"]
    assert (model["unk_token"], model["fuse_unk"], model["byte_fallback"]) == (None, False, False)


def test_control_and_user_tokens_stay_whole(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, "gpt2")
    assert tokenizer("a<｜user｜><think></s>").input_ids == [5, 2, 3, 1]
    assert tokenizer.decode([2, 3, 1, 5], skip_special_tokens=True) == "<think>a"


@pytest.mark.parametrize(
    ("model", "add_bos", "start"),
    [
        ("gpt2", None, []),
        ("gpt2", True, [0]),
        ("llama", None, [0]),
        ("llama", False, []),
    ],
)
def test_bos_where_the_file_wants_it(
    tmp_path: Path, model: str, add_bos: bool | None, start: list[int]
) -> None:
    assert saved(tmp_path, model, add_bos)("ab").input_ids == [*start, 7]


def test_llama_3_takes_words_whole_and_begins_with_bos(tmp_path: Path) -> None:
    assert saved(tmp_path, "gpt2", pre="llama-bpe")("âĸģ").input_ids[0] == 0
    assert read_json(tmp_path / "tokenizer.json")["model"]["ignore_merges"] is True
    assert saved(tmp_path, "gpt2", False, pre="llama-bpe")("ab").input_ids == [7]
    saved(tmp_path, "gpt2", pre="gpt-2")
    assert read_json(tmp_path / "tokenizer.json")["model"]["ignore_merges"] is False
