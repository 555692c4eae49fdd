"""Reading a data folder, choosing domains, and cutting documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from cluster_router.wire.errors import ConfigError
from training.base import FrozenBase
from training.config import DataSettings
from training.corpus import Domains
from training.data import Document, WindowCutter, read_documents


def _write(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def test_a_larger_limit_only_adds_documents(data: Path) -> None:
    few = read_documents(data, "animals", "train", 5)
    many = read_documents(data, "animals", "train", 20)
    assert many[:5] == few
    assert len({document.text for document in many}) == 20


def test_the_order_is_a_function_of_the_texts(data: Path, tmp_path: Path) -> None:
    original = data / "animals.train.jsonl.gz"
    with gzip.open(original, "rt") as file:
        lines = file.read().splitlines()
    _write(tmp_path / original.name, lines[::-1])
    assert read_documents(tmp_path, "animals", "train", 9) == read_documents(
        data, "animals", "train", 9
    )


def test_splits_share_no_document(data: Path) -> None:
    train = {document.text for document in read_documents(data, "animals", "train", 99)}
    test = {document.text for document in read_documents(data, "animals", "test", 99)}
    assert train.isdisjoint(test)


def test_excluded_domains_are_never_seen_even_if_held_out_too(data: Path) -> None:
    settings = DataSettings(exclude=("sec*",), holdout=("numbers", "secret"))
    assert Domains.of(data, settings) == Domains(("animals",), ("secret",), ("numbers",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DataSettings(exclude=("*",)), "nothing is left to train on"),
        (DataSettings(holdout=("nmbers",)), "'nmbers'"),
    ],
)
def test_a_choice_of_domains_that_cannot_be_is_refused(
    data: Path, settings: DataSettings, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Domains.of(data, settings)


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Domains.of(tmp_path / "nowhere", DataSettings())
    with pytest.raises(ConfigError, match="holds no"):
        Domains.of(tmp_path, DataSettings())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["not json"], "line 1 is not a document"),
        (['{"words": "x"}'], "line 1 is not a document"),
        (['{"text": "  "}'], "line 1 has no text"),
        (['{"text": "only one"}'], r"holds 1 document\(s\), at least 2"),
        ([], r"holds 0 document\(s\)"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    _write(tmp_path / "odd.train.jsonl.gz", lines)
    with pytest.raises(ConfigError, match=message):
        read_documents(tmp_path, "odd", "train", 10)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.train.jsonl.gz"
    _write(path, [json.dumps({"text": f"text {number}"}) for number in range(500)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"cannot read .*odd\.train"):
        read_documents(tmp_path, "odd", "train", 10)


def test_context_and_scored_tokens_make_up_the_document(base: FrozenBase) -> None:
    cutter = WindowCutter(base.tokenizer, context=16, scored=8)
    text = "the quick brown fox " * 10
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    window = cutter.cut(Document(text, "animals"))
    assert window is not None
    assert window.context_tokens.tolist() == ids[:16]
    assert window.targets.tolist() == ids[16:24]
    assert window.scored_bytes == len(base.tokenizer.decode(ids[16:24]).encode())


def test_a_short_document_gives_half_to_each_part(base: FrozenBase) -> None:
    window = WindowCutter(base.tokenizer, 128, 256).cut(Document("0123456789", "numbers"))
    assert window is not None
    assert window.context == len(window.tokens) // 2 > 0
    assert WindowCutter(base.tokenizer, 128, 256).cut(Document("!", "numbers")) is None


def test_running_text_is_covered_evenly(base: FrozenBase, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox " * 100)
    ids = base.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    windows = WindowCutter(base.tokenizer, 16, 8).cut_running_text(path, "text", 4)
    assert [len(window.tokens) for window in windows] == [24] * 4
    np.testing.assert_array_equal(windows[-1].tokens, ids[-24:])
    assert WindowCutter(base.tokenizer, 16, 8).cut_running_text(tmp_path / "none", "x", 4) == []
