"""Which documents are scored, which only arrive, and the running text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.base import FrozenBase
from training.config import DataSettings
from training.evaluation.groups import Group, GroupReader
from training.evaluation.settings import EvaluateSettings

COLUMNS = DataSettings(context_tokens=8, scored_tokens=8)


def _data(folder: Path, **counts: int) -> Path:
    """Documents of one domain that begin with the name of their split."""
    for split, count in counts.items():
        texts = [f"{split} {number} " + f"the quick {number} " * 8 for number in range(count)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"poems.{split}.jsonl").write_text(rows)
    return folder


def _groups(
    folder: Path, base: FrozenBase, settings: EvaluateSettings, trained: tuple[str, ...] = ()
) -> dict[str, Group]:
    reader = GroupReader.open(folder, base, trained, COLUMNS, settings, folder / ".cache")
    return {group.name: group for group in reader.groups()}


@pytest.mark.parametrize(
    ("counts", "arriving"),
    [
        ({"test": 3, "validation": 20, "train": 9}, ["train"]),
        ({"test": 9, "validation": 20, "train": 9}, ["validation"]),
        ({"test": 3, "validation": 20, "train": 2}, ["train", "train", "validation", "validation"]),
    ],
)
def test_what_only_arrives_comes_first_from_splits_that_give_no_scored_document(
    base: FrozenBase,
    quick_settings: EvaluateSettings,
    tmp_path: Path,
    counts: dict[str, int],
    arriving: list[str],
) -> None:
    assert (quick_settings.documents, quick_settings.stream.warmup_documents) == (6, 4)
    unseen = _groups(_data(tmp_path, **counts), base, quick_settings)["unseen"]

    def splits(part: str) -> list[str]:
        windows = getattr(unseen, part)
        return [base.tokenizer.decode(window.tokens.tolist()).split()[0] for window in windows]

    assert splits("windows").count("test") == min(6, counts["test"])
    assert splits("warmup") == (arriving if len(arriving) > 1 else 4 * arriving)


@pytest.mark.parametrize("name", ["test.raw.txt", "wiki.test.raw", "test.txt", "wiki.test.tokens"])
def test_the_running_text_is_found_under_each_of_its_names(
    base: FrozenBase, quick_settings: EvaluateSettings, tmp_path: Path, name: str
) -> None:
    _data(tmp_path, test=6, validation=6, train=6)
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / name).write_text("the quick brown fox " * 50)
    assert len(_groups(tmp_path, base, quick_settings)["wikitext"].windows) == 24


def test_a_folder_for_the_running_text_without_it_is_named(
    base: FrozenBase,
    quick_settings: EvaluateSettings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _data(tmp_path, test=6, validation=6, train=6)
    assert "wikitext" not in _groups(tmp_path, base, quick_settings)
    assert not caplog.messages
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "text.txt").write_text("the quick brown fox " * 50)
    assert "wikitext" not in _groups(tmp_path, base, quick_settings)
    (warning,) = caplog.messages
    assert "wikitext-2 is not measured: it holds none of test.raw.txt, wiki.test.raw" in warning
