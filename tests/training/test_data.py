"""Reading documents: order, limits, and what is wrong with a data folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from cluster_router.wire.errors import ConfigError, SetupError
from training.config import DataSettings
from training.data import Reader, open_reader, read_documents
from training.data.optional import load


def _write(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


@pytest.fixture(scope="module")
def reader(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return open_reader(data, DataSettings(), tmp_path_factory.mktemp("cache"))


def test_a_larger_limit_only_adds_documents(reader: Reader) -> None:
    few = read_documents(reader, "animals", "train", 5)
    many = read_documents(reader, "animals", "train", 20)
    assert many[:5] == few
    assert len({document.text for document in many}) == 20


def test_the_order_is_a_function_of_the_texts(reader: Reader, data: Path, tmp_path: Path) -> None:
    original = data / "animals.train.jsonl.gz"
    with gzip.open(original, "rt") as file:
        lines = file.read().splitlines()
    for split in ("train", "validation", "test"):
        _write(tmp_path / f"animals.{split}.jsonl.gz", lines[::-1] if split == "train" else [])
    reversed_reader = open_reader(tmp_path, DataSettings(), tmp_path / "cache")
    again = read_documents(reversed_reader, "animals", "train", 9)
    assert again == read_documents(reader, "animals", "train", 9)


def test_splits_share_no_document(reader: Reader) -> None:
    train = {document.text for document in read_documents(reader, "animals", "train", 99)}
    test = {document.text for document in read_documents(reader, "animals", "test", 99)}
    assert train.isdisjoint(test)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["not json"], "line 1 is not JSON"),
        (['"text"'], "line 1 is not an object"),
        (['{"words": "x"}'], "line 1 has no column 'text', only words; set data.text_column"),
        (['{"text": "fine"}', '{"text": 7}'], "row 2: 'text' is not text"),
        (['{"text": "half of a pair: \\ud83d"}'], "row 1: 'text' is not text"),
        (['{"text": "only one"}'], r"holds 1 document\(s\), at least 2"),
        (['{"text": "twice"}', "", '{"text": "twice"}'], r"holds 1 document\(s\), at least 2"),
        (['{"text": "one"}', '{"text": "  "}', '{"text": null}'], r"holds 1 document\(s\)"),
        ([], r"holds 0 document\(s\).* exclude the domain 'odd'"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    _write(tmp_path / "odd.train.jsonl.gz", lines)
    for split in ("validation", "test"):
        _write(tmp_path / f"odd.{split}.jsonl.gz", [])
    with pytest.raises(ConfigError, match=message):
        read_documents(
            open_reader(tmp_path, DataSettings(), tmp_path / "cache"), "odd", "train", 10
        )


@pytest.mark.parametrize("name", ["odd.train.jsonl.gz", "odd.test.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    _write(path, [json.dumps({"text": f"text {number}"}) for number in range(500)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
        open_reader(tmp_path, DataSettings(near_duplicates="keep"), tmp_path / "cache")


def test_a_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cannot read .*latin\.txt"):
        open_reader(tmp_path, DataSettings(near_duplicates="keep"), tmp_path / "cache")


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        open_reader(tmp_path / "nowhere", DataSettings(), tmp_path / "cache")
    (tmp_path / "corpus.csv").write_text("text\nhello")
    with pytest.raises(ConfigError, match=r"holds no data; it may hold <domain>\.<split>"):
        open_reader(tmp_path, DataSettings(), tmp_path / "cache")
    with pytest.raises(ConfigError, match="is a file; name the folder"):
        open_reader(tmp_path / "corpus.csv", DataSettings(), tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetupError, match="--cache"):
        open_reader(data, DataSettings(), tmp_path / "file" / "cache")


def test_a_missing_library_is_named() -> None:
    with pytest.raises(SetupError, match=r"Parquet needs .*pip install some-package"):
        load("no_such_module", "some-package", "Parquet")
