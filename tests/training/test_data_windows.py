"""Windows: context and scored tokens of documents, short, long and very long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster_router.wire.errors import ConfigError
from training.base import FrozenBase
from training.config import DataSettings
from training.data import Document, Reader, WindowCutter, open_reader

TEXT = "the quick brown fox jumps over the lazy dog " * 40


def _ids(base: FrozenBase, text: str) -> list[int]:
    return base.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_context_and_scored_tokens_make_up_the_document(base: FrozenBase) -> None:
    cutter = WindowCutter(base.tokenizer, context=16, scored=8)
    ids = _ids(base, TEXT)
    window = cutter.cut(Document(TEXT, "animals"))
    assert window is not None
    assert window.context_tokens.tolist() == ids[:16]
    assert window.targets.tolist() == ids[16:24]
    assert window.scored_bytes == len(base.tokenizer.decode(ids[16:24]).encode())


def test_a_short_document_gives_half_to_each_part(base: FrozenBase) -> None:
    window = WindowCutter(base.tokenizer, 128, 256).cut(Document("0123456789", "numbers"))
    assert window is not None
    assert window.context == len(window.tokens) // 2 > 0
    assert WindowCutter(base.tokenizer, 128, 256).cut(Document("!", "numbers")) is None


def test_further_windows_follow_on_and_share_no_token(base: FrozenBase) -> None:
    cutter = WindowCutter(base.tokenizer, 16, 24)
    ids = _ids(base, TEXT)
    windows = cutter.windows(Document(TEXT, "animals"), 3)
    assert [window.context for window in windows] == [16, 16, 16]
    np.testing.assert_array_equal(np.concatenate([w.tokens for w in windows]), ids[:120])
    first = cutter.cut(Document(TEXT, "animals"))
    assert first is not None
    np.testing.assert_array_equal(first.tokens, windows[0].tokens)


@pytest.mark.parametrize(("left", "windows"), [(0, 1), (31, 1), (32, 2), (39, 2), (40, 2), (72, 3)])
def test_a_further_window_needs_a_whole_context_and_as_much_to_score(
    base: FrozenBase, left: int, windows: int
) -> None:
    ids = _ids(base, TEXT)[: 40 + left]
    text = base.tokenizer.decode(ids)
    assert _ids(base, text) == ids
    cut = WindowCutter(base.tokenizer, 16, 24).windows(Document(text, "animals"), 9)
    assert len(cut) == windows
    assert sum(len(window.tokens) for window in cut) == (40 + left if windows > 1 else 40)


class LongestText:
    """The real tokenizer, noting the longest text it was given."""

    def __init__(self, base: FrozenBase) -> None:
        self.base, self.longest = base, 0

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        self.longest = max(self.longest, len(text))
        return self.base.tokenizer(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        return self.base.tokenizer.decode(token_ids)


def test_of_a_very_long_document_only_the_start_is_tokenised(base: FrozenBase) -> None:
    text = TEXT * 1000
    tokenizer = LongestText(base)
    windows = WindowCutter(tokenizer, 16, 24).windows(Document(text, "animals"), 2)
    np.testing.assert_array_equal(
        np.concatenate([window.tokens for window in windows]), _ids(base, TEXT)[:80]
    )
    assert tokenizer.longest < 10_000


def test_a_start_with_long_tokens_is_read_further(base: FrozenBase) -> None:
    gap = " " * 5000
    text = f"the quick{gap}brown fox " + TEXT
    windows = WindowCutter(base.tokenizer, 4, 4).windows(Document(text, "animals"), 1)
    np.testing.assert_array_equal(windows[0].tokens, _ids(base, text)[:8])


@pytest.fixture(scope="module")
def long_and_short(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("data")
    (folder / "notes").mkdir()
    for number in range(60):
        text = f"{number} " + TEXT[: 2000 if number % 2 else 100]
        (folder / "notes" / f"{number}.txt").write_text(text)
    return open_reader(folder, DataSettings(near_duplicates="keep"), folder / ".cache")


def test_more_windows_a_document_leave_the_first_ones_in_place(
    base: FrozenBase, long_and_short: Reader
) -> None:
    cutter = WindowCutter(base.tokenizer, 16, 24)
    one = cutter.cut_split(long_and_short, "train", ["notes"], 20)
    three = cutter.cut_split(long_and_short, "train", ["notes"], 20, windows_per_document=3)
    assert len(one) == 20
    assert len(three) > 30
    for window, again in zip(one, three, strict=False):
        np.testing.assert_array_equal(window.tokens, again.tokens)


def test_a_domain_of_texts_too_short_to_score_is_named(base: FrozenBase, tmp_path: Path) -> None:
    (tmp_path / "marks.train.jsonl").write_text('{"text": "!"}\n{"text": "?"}\n')
    for split in ("validation", "test"):
        (tmp_path / f"marks.{split}.jsonl").touch()
    reader = open_reader(tmp_path, DataSettings(), tmp_path / ".cache")
    with pytest.raises(ConfigError, match="of 'marks' are longer than a token"):
        WindowCutter(base.tokenizer, 16, 24).cut_split(reader, "train", ["marks"], 10)


def test_running_text_is_covered_evenly(base: FrozenBase, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox " * 100)
    ids = _ids(base, path.read_text())
    windows = WindowCutter(base.tokenizer, 16, 8).cut_running_text(path, "text", 4)
    assert [len(window.tokens) for window in windows] == [24] * 4
    np.testing.assert_array_equal(windows[-1].tokens, ids[-24:])
    assert WindowCutter(base.tokenizer, 16, 8).cut_running_text(tmp_path / "none", "x", 4) == []
