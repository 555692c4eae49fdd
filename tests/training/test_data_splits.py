"""Splits made by a hash of groups, and duplicates over all splits and domains."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from training.config import DataSettings
from training.data import SPLITS, Reader, open_reader
from training.data.near import NearDuplicates, shingles
from training.data.reader import SourceReader

KEEP = DataSettings(near_duplicates="keep")
WORDS = [f"word{number}" for number in range(500)]


def _write(path: Path, texts: list[str], sources: list[str] | None = None) -> None:
    rows = [{"text": text} for text in texts]
    for row, source in zip(rows, sources or [], strict=False):
        row["source"] = source
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _texts(reader: Reader, domain: str) -> dict[str, set[str]]:
    return {split: {d.text for d in reader.documents(domain, split)} for split in SPLITS}


def _part(reader: SourceReader, domain: str, split: str) -> tuple[int, int, int, int]:
    part = reader.inventory[domain][split]
    return part.documents, part.empty, part.exact, part.near


def test_about_a_tenth_of_the_groups_goes_into_validation_and_test(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [f"text {number}" for number in range(2000)])
    reader = open_reader(tmp_path, KEEP, tmp_path / ".cache")
    counts = [reader.count("a", split) for split in SPLITS]
    assert sum(counts) == 2000
    assert counts[0] == pytest.approx(1600, abs=60)
    assert counts[1] == pytest.approx(200, abs=45)


def test_a_group_lies_in_one_split_even_over_domains(tmp_path: Path) -> None:
    for domain in ("a", "b"):
        texts = [f"{domain} {number}" for number in range(400)]
        _write(tmp_path / f"{domain}.jsonl", texts, [f"w{n // 4}#{n}" for n in range(400)])
    reader = open_reader(tmp_path, KEEP, tmp_path / ".cache")
    homes: dict[str, set[str]] = {}
    for domain in ("a", "b"):
        for split in SPLITS:
            for document in reader.documents(domain, split):
                homes.setdefault(document.group, set()).add(split)
    assert len(homes) == 100
    assert all(len(splits) == 1 for splits in homes.values())
    assert set().union(*homes.values()) == set(SPLITS)


def test_a_group_may_be_the_number_nought(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "source": n % 2} for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = open_reader(tmp_path, KEEP, tmp_path / ".cache")
    homes: dict[str, set[str]] = {}
    for split in SPLITS:
        for document in reader.documents("a", split):
            homes.setdefault(document.group, set()).add(split)
    assert sorted(homes) == ["0", "1"]
    assert all(len(splits) == 1 for splits in homes.values())


def test_adding_documents_moves_none_of_the_others(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(200)]
    _write(tmp_path / "a.jsonl", texts[:100])
    before = _texts(open_reader(tmp_path, KEEP, tmp_path / ".cache"), "a")
    _write(tmp_path / "a.jsonl", texts[::-1])
    after = _texts(open_reader(tmp_path, KEEP, tmp_path / ".cache"), "a")
    assert all(before[split] <= after[split] for split in SPLITS)


def test_missing_splits_are_made_from_the_training_documents(tmp_path: Path) -> None:
    _write(tmp_path / "a.train.jsonl", [f"text {number}" for number in range(300)])
    _write(tmp_path / "a.test.jsonl", [f"test {number}" for number in range(9)])
    texts = _texts(open_reader(tmp_path, KEEP, tmp_path / ".cache"), "a")
    assert len(texts["test"]) == 9
    assert 10 < len(texts["validation"]) < 60
    assert len(texts["train"] | texts["validation"]) == 300


def test_the_same_text_is_kept_once_and_in_the_earlier_split(tmp_path: Path) -> None:
    _write(tmp_path / "a.train.jsonl", ["one", "two", "two", ""])
    _write(tmp_path / "a.validation.jsonl", ["one", "three", "four"])
    _write(tmp_path / "a.test.jsonl", ["five", "six\n", " two"])
    _write(tmp_path / "b.test.jsonl", ["six", "seven"])
    reader = open_reader(tmp_path, DataSettings(), tmp_path / ".cache")
    assert _texts(reader, "a") == {
        "train": {"one", "two"},
        "validation": {"three", "four"},
        "test": {"five", "six\n"},
    }
    assert _texts(reader, "b")["test"] == {"seven"}
    assert [len(list(reader.documents("a", split))) for split in SPLITS] == [2, 2, 2]
    assert _part(reader, "a", "train") == (2, 1, 1, 0)
    assert _part(reader, "a", "test") == (2, 0, 1, 0)
    assert _part(reader, "b", "test") == (1, 0, 1, 0)


def _sentence(dice: random.Random, words: int = 120) -> list[str]:
    return dice.choices(WORDS, k=words)


@pytest.fixture
def near_data(tmp_path: Path) -> Path:
    """Test documents that are, in turn, fresh and a training document with five words changed."""
    pytest.importorskip("datasketch", reason="no `datasketch`: near-duplicates cannot be found")
    dice = random.Random(0)
    train = [_sentence(dice) for _ in range(20)]
    fresh = [" ".join(_sentence(dice)) for _ in range(20)]
    copies = []
    for words in train:
        changed = list(words)
        changed[10:15] = _sentence(dice, 5)
        copies.append(" ".join(changed))
    _write(tmp_path / "a.train.jsonl", [" ".join(words) for words in train])
    _write(tmp_path / "a.validation.jsonl", fresh[:10])
    _write(tmp_path / "a.test.jsonl", [*fresh[10:], *copies])
    return tmp_path


def test_near_duplicates_of_training_documents_leave_the_test_split(near_data: Path) -> None:
    settings = DataSettings(near_duplicates="drop")
    reader = open_reader(near_data, settings, near_data / ".cache")
    assert _part(reader, "a", "train") == (20, 0, 0, 0)
    assert _part(reader, "a", "validation") == (10, 0, 0, 0)
    assert _part(reader, "a", "test") == (10, 0, 0, 20)
    assert len(list(reader.documents("a", "test"))) == 10


def test_ready_splits_are_taken_as_they_are_unless_asked(near_data: Path) -> None:
    reader = open_reader(near_data, DataSettings(), near_data / ".cache")
    assert reader.count("a", "test") == 30
    _write(near_data / "b.jsonl", ["one without splits is enough"])
    assert open_reader(near_data, DataSettings(), near_data / ".cache").count("a", "test") == 10


def test_texts_count_as_near_from_about_sixty_per_cent_shared() -> None:
    pytest.importorskip("datasketch", reason="no `datasketch`: near-duplicates cannot be found")
    dice = random.Random(1)
    found = {}
    for changed in (10, 90):
        near, hits = NearDuplicates(), 0
        for _ in range(50):
            words = _sentence(dice, 300)
            near.seen(" ".join(words))
            words[:changed] = _sentence(dice, changed)
            hits += near.seen(" ".join(words))
        found[changed] = hits
    # 10 of 300 words: 94 % of the runs shared; 90: 52 %.
    assert found[10] == 50
    assert found[90] <= 15


def test_runs_of_words_are_hashed_apart() -> None:
    a, b = shingles("a b c d e f"), shingles("A b  c d\ne g")
    assert (len(a), len(b), len(np.intersect1d(a, b))) == (2, 2, 1)
    assert len(shingles("a b c")) == 1
    assert len(np.intersect1d(shingles("b a"), shingles("a b"))) == 0


def test_an_inventory_is_taken_again_only_when_the_data_changed(tmp_path: Path) -> None:
    cache = tmp_path / ".cache"
    _write(tmp_path / "a.jsonl", [f"text {number}" for number in range(50)])
    open_reader(tmp_path, KEEP, cache)
    (kept,) = (cache / "inventories").iterdir()
    content = json.loads(kept.read_text())
    content["a"]["train"]["documents"] = 7777
    kept.write_text(json.dumps(content))
    assert open_reader(tmp_path, KEEP, cache).count("a", "train") == 7777
    kept.write_text("{damaged")
    assert open_reader(tmp_path, KEEP, cache).count("a", "train") < 50
    _write(tmp_path / "a.jsonl", [f"text {number}" for number in range(5000)])
    assert open_reader(tmp_path, KEEP, cache).count("a", "train") > 3000
    assert len(list((cache / "inventories").iterdir())) == 2
