"""Each format gives the same documents; formats can be mixed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster_router.wire.errors import ConfigError, SetupError
from training.config import DataSettings
from training.data import SPLITS, Document, Reader, open_reader

Rows = list[dict[str, Any]]
KEEP = DataSettings(near_duplicates="keep")
ROWS: Rows = [{"text": f"text {n}\nand more", "source": f"work {n // 3}#{n}"} for n in range(60)]


def _jsonl(folder: Path, rows: Rows, name: str = "tales.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _gzipped(folder: Path, rows: Rows) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "tales.jsonl.gz").write_bytes(gzip.compress(content.encode()))


def _parquet(folder: Path, rows: Rows, name: str = "tales.parquet") -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=7)


def _parquet_folder(folder: Path, rows: Rows) -> None:
    (folder / "tales.parquet").mkdir()
    _parquet(folder / "tales.parquet", rows[:20], "part-0.parquet")
    _parquet(folder / "tales.parquet", rows[20:], "part-1.parquet")


def _folder_of_parts(folder: Path, rows: Rows) -> None:
    """As a service's request log is."""
    (folder / "tales").mkdir()
    _jsonl(folder / "tales", rows[:20], "1-router.jsonl")
    _jsonl(folder / "tales", rows[20:], "2-router.jsonl")


def _documents(reader: Reader, domain: str = "tales") -> dict[str, list[Document]]:
    return {split: list(reader.documents(domain, split)) for split in SPLITS}


@pytest.mark.parametrize("write", [_jsonl, _gzipped, _parquet, _parquet_folder, _folder_of_parts])
def test_files_of_rows_give_the_same_documents(
    tmp_path: Path, write: Callable[[Path, Rows], None]
) -> None:
    write(tmp_path, ROWS)
    reader = open_reader(tmp_path, KEEP, tmp_path / ".cache")
    documents = _documents(reader)
    assert reader.domains() == ["tales"]
    assert {split: len(found) for split, found in documents.items()} == {
        split: reader.count("tales", split) for split in SPLITS
    }
    everything = [document for split in SPLITS for document in documents[split]]
    expected = {(row["text"], row["source"].split("#")[0]) for row in ROWS}
    assert {(document.text, document.group) for document in everything} == expected
    (tmp_path / "other").mkdir()
    _jsonl(tmp_path / "other", ROWS)
    assert documents == _documents(open_reader(tmp_path / "other", KEEP, tmp_path / ".cache"))


def test_each_text_file_of_a_folder_is_a_document(tmp_path: Path) -> None:
    nested = tmp_path / "tales" / "by author"
    nested.mkdir(parents=True)
    (nested / "one.txt").write_text("the first")
    (tmp_path / "tales" / "two.md").write_text("# the second")
    for ignored in ("three.py", ".hidden.txt"):
        (tmp_path / "tales" / ignored).write_text("not this")
    reader = open_reader(tmp_path, KEEP, tmp_path / ".cache")
    texts = {document.text for part in _documents(reader).values() for document in part}
    assert texts == {"the first", "# the second"}


def test_formats_and_ready_splits_can_be_mixed(tmp_path: Path) -> None:
    _jsonl(tmp_path, ROWS[:20], "stories.train.jsonl")
    _parquet(tmp_path, ROWS[20:25], "stories.valid.parquet")
    _jsonl(tmp_path, ROWS[25:30], "stories.test.jsonl")
    _parquet(tmp_path, ROWS[30:])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a note")
    (tmp_path / "README.md").write_text("no document")
    reader = open_reader(tmp_path, KEEP, tmp_path / ".cache")
    assert reader.domains() == ["notes", "stories", "tales"]
    assert [reader.count("stories", split) for split in SPLITS] == [20, 5, 5]
    assert sum(reader.count("tales", split) for split in SPLITS) == 30


def test_splits_are_told_by_the_names_of_files_in_a_folder_too(tmp_path: Path) -> None:
    folder = tmp_path / "tales"
    folder.mkdir()
    _jsonl(folder, ROWS[:20], "train.jsonl")
    _jsonl(folder, ROWS[20:24], "valid.jsonl")
    _jsonl(folder, ROWS[24:27], "1.test.jsonl")
    content = "".join(json.dumps(row) + "\n" for row in ROWS[27:30])
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    reader = open_reader(tmp_path, KEEP, tmp_path / ".cache")
    assert reader.domains() == ["tales"]
    texts = {split: {d.text for d in found} for split, found in _documents(reader).items()}
    expected = {"train": ROWS[:20], "validation": ROWS[20:24], "test": ROWS[24:30]}
    assert texts == {split: {row["text"] for row in rows} for split, rows in expected.items()}


def test_the_running_text_of_the_evaluation_is_no_domain(tmp_path: Path) -> None:
    _jsonl(tmp_path, ROWS)
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "test.raw.txt").write_text("= Robert =")
    assert open_reader(tmp_path, KEEP, tmp_path / ".cache").domains() == ["tales"]


def test_a_subfolder_without_texts_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "rows.jsonl").write_text('\n{"question": "why", "answer": "so"}\n')
    with pytest.raises(ConfigError, match=r"no column 'text', only question, answer; set data"):
        open_reader(tmp_path, KEEP, tmp_path / ".cache")
    _jsonl(tmp_path, ROWS)
    caplog.clear()
    assert open_reader(tmp_path, KEEP, tmp_path / ".cache").domains() == ["tales"]
    assert "rows.jsonl is left out: it has no column 'text'" in caplog.text


@pytest.mark.parametrize("write", [_jsonl, _parquet])
def test_columns_can_be_named(tmp_path: Path, write: Callable[[Path, Rows], None]) -> None:
    rows = [
        {"content": f"text {n}", "topic": ("sea", "land")[n % 2], "book": f"{n // 10}"}
        for n in range(60)
    ]
    write(tmp_path, rows)
    columns = {"text_column": "content", "domain_column": "topic", "group_column": "book"}
    reader = open_reader(tmp_path, KEEP.model_copy(update=columns), tmp_path / ".cache")
    assert reader.domains() == ["land", "sea"]
    sea = {d.text for split in SPLITS for d in reader.documents("sea", split)}
    assert sea == {f"text {n}" for n in range(0, 60, 2)}
    groups = [{d.group for d in reader.documents("sea", split)} for split in SPLITS]
    assert sum(len(group) for group in groups) == len(set().union(*groups)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "body"}, r"no column 'body', only text, source; set data\.text_column"),
        ({"domain_column": "topic"}, r"no column 'topic'.*data\.domain_column"),
    ],
)
@pytest.mark.parametrize("write", [_jsonl, _parquet])
def test_a_column_that_is_not_there_is_named(
    tmp_path: Path, write: Callable[[Path, Rows], None], changes: dict[str, str], message: str
) -> None:
    write(tmp_path, ROWS)
    with pytest.raises(ConfigError, match=message):
        open_reader(tmp_path, KEEP.model_copy(update=changes), tmp_path / ".cache")


def test_a_row_without_a_domain_is_named(tmp_path: Path) -> None:
    _parquet(tmp_path, [{"text": "a", "topic": "sea"}, {"text": "b", "topic": None}])
    settings = KEEP.model_copy(update={"domain_column": "topic"})
    with pytest.raises(ConfigError, match="row 2: 'topic' names no domain"):
        open_reader(tmp_path, settings, tmp_path / ".cache")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the layout of a hub dataset; what `datasets` caches goes beside it."""
    datasets = pytest.importorskip("datasets", reason="no `datasets`: hub data cannot be read")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub-cache")
    folder = tmp_path / "tales"
    folder.mkdir()
    _jsonl(folder, ROWS[:40], "train.jsonl")
    _jsonl(folder, ROWS[40:], "test.jsonl")
    return folder


def test_a_hub_dataset_is_read_through_datasets(hub: Path, tmp_path: Path) -> None:
    reader = open_reader(f"hub:{hub}", KEEP, tmp_path / "cache")
    assert reader.domains() == ["tales"]
    documents = _documents(reader)
    # There is no validation split: a part of the training groups makes one.
    given = {document.text for split in ("train", "validation") for document in documents[split]}
    assert given == {row["text"] for row in ROWS[:40]}
    assert {document.text for document in documents["test"]} == {row["text"] for row in ROWS[40:]}
    assert documents["train"][0].group.startswith("work")


def test_classes_of_a_hub_dataset_are_domains_by_name(hub: Path, tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "topic": ClassLabel(names=["sea", "land"])})
    rows = {"text": [f"text {n}" for n in range(30)], "topic": [n % 2 for n in range(30)]}
    table = tmp_path / "topics"
    table.mkdir()
    Dataset.from_dict(rows, features).to_parquet(table / "train.parquet")
    settings = KEEP.model_copy(update={"domain_column": "topic"})
    reader = open_reader(f"hub:{table}", settings, tmp_path / "cache")
    assert reader.domains() == ["land", "sea"]


@pytest.mark.parametrize(
    ("suffix", "message"), [("-not-there", "check the name"), (":odd", "'odd'")]
)
def test_a_hub_dataset_that_is_not_there_is_named(
    hub: Path, tmp_path: Path, suffix: str, message: str
) -> None:
    with pytest.raises(SetupError, match=message):
        open_reader(f"hub:{hub}{suffix}", KEEP, tmp_path / "cache")


def test_a_hub_dataset_without_text_is_named(hub: Path, tmp_path: Path) -> None:
    settings = KEEP.model_copy(update={"text_column": "body"})
    with pytest.raises(ConfigError, match="has no column 'body'"):
        open_reader(f"hub:{hub}", settings, tmp_path / "cache")
