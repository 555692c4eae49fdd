from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lm_workers.detokenizer import Detokenizer, TokenTexts


def stream(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: tuple[str, ...] = ()
) -> tuple[list[str], str | None]:
    """Pieces of `text` as they come out, and the stop string met."""
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("Prompt:"), stop)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped_by is not None:
            break
    pieces.append(detokenizer.flush())
    return pieces, detokenizer.stopped_by


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40))
def test_pieces_join_to_the_text(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    pieces, _ = stream(tiny_tokenizer, text)
    assert "".join(pieces) == text


def test_no_half_characters(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, _ = stream(tiny_tokenizer, "naïve 🦎 日本")
    assert all("\ufffd" not in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 5


def test_unfinished_bytes_come_out_at_the_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(tiny_tokenizer, [5], ())
    for token in tiny_tokenizer.encode("a🦎")[:-1]:
        detokenizer.push(token)
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((" jumps",), "The quick brown fox"),
        (("own", "quick"), "The "),
        (("zebra",), "The quick brown fox jumps over"),
        (("over and out",), "The quick brown fox jumps over"),
        (("n fox j",), "The quick brow"),
    ],
)
def test_stop_strings(
    tiny_tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...], expected: str
) -> None:
    pieces, stopped_by = stream(tiny_tokenizer, "The quick brown fox jumps over", stop)
    assert "".join(pieces) == expected
    assert (stopped_by in stop) == (expected != "The quick brown fox jumps over")


def test_a_possible_stop_is_held_back_until_it_is_none(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    detokenizer = Detokenizer(tiny_tokenizer, [5], ("012",))
    sent = ""
    for token in tiny_tokenizer.encode("x0 01y"):
        sent += detokenizer.push(token)
        assert not sent.endswith("0")
    assert sent == "x0 01y"


def test_stop_strings_do_not_count_while_they_may_not(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    detokenizer = Detokenizer(tiny_tokenizer, [5], ("a",))
    tokens = tiny_tokenizer.encode("a b a")
    text = "".join(detokenizer.push(token, may_stop=False) for token in tokens[:-1])
    assert detokenizer.stopped_by is None
    text += detokenizer.push(tokens[-1], may_stop=True) + detokenizer.flush()
    assert (text, detokenizer.stopped_by) == ("a b ", "a")


def test_bytes_of_single_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = TokenTexts(tiny_tokenizer)
    tokens = tiny_tokenizer.encode("é🦎 fox")
    assert b"".join(texts.of(token)[1] for token in tokens).decode() == "é🦎 fox"
