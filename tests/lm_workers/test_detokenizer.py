from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lm_workers.detokenizer import Detokenizer, TokenTexts

WORDS = ["\u2581the", "\u2581a", "\u2581cat", "a", "b"]


@pytest.fixture(scope="session")
def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: words, and bytes for all that is no word."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def byte(value: int) -> str:
    return f"<0x{value:02X}>"


def pieces_of(
    tokenizer: PreTrainedTokenizerFast, prompt: list[str], answer: list[str], stop: str = ""
) -> list[str]:
    """What comes out for each token of an answer, given by name, and at its end."""
    ids = tokenizer.convert_tokens_to_ids
    detokenizer = Detokenizer(tokenizer, ids(prompt), (stop,) if stop else ())
    return [*(detokenizer.push(ids(token)) for token in answer), detokenizer.flush()]


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


def test_a_wrong_byte_neither_ends_an_answer_nor_takes_back_what_was_sent(
    byte_fallback: PreTrainedTokenizerFast,
) -> None:
    answer = ["\u2581the", byte(10), byte(0xF0), "\u2581cat", "\u2581a"]
    expected = [" the", "\n", "", "\ufffd cat", " a", ""]
    assert pieces_of(byte_fallback, ["\u2581a"], answer) == expected
    # The first byte may belong to the prompt.
    answer = [byte(0xF0), byte(0x9F), "\u2581cat", byte(0xC3), byte(0xA9), byte(0xF0)]
    expected = ["", "", "\ufffd\ufffd cat", "", "\u00e9", "", "\ufffd"]
    assert pieces_of(byte_fallback, ["\u2581a", byte(10)], answer) == expected


TOKENS = st.lists(st.sampled_from([*WORDS, *map(byte, [10, 65, 0x9F, 0xC3, 0xA9, 0xF0])]))


@given(prompt=TOKENS, answer=TOKENS)
def test_no_word_is_lost_or_repeated_among_any_bytes(
    byte_fallback: PreTrainedTokenizerFast, prompt: list[str], answer: list[str]
) -> None:
    text = "".join(pieces_of(byte_fallback, prompt, answer))
    words = [token.removeprefix("\u2581") for token in answer if token in WORDS]
    assert re.sub("[^a-z]", "", text) == "".join(words)


@pytest.mark.parametrize("prompt", ["secret \ufffd", "secret \U0001f98e"])
def test_a_prompt_that_ends_within_a_character_is_no_part_of_the_answer(
    tiny_tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    tokens = tiny_tokenizer.encode(prompt)
    detokenizer = Detokenizer(tiny_tokenizer, tokens[: None if "\ufffd" in prompt else -1], ())
    pieces = [detokenizer.push(token) for token in tiny_tokenizer.encode(" fox")]
    assert "".join([*pieces, detokenizer.flush()]) == " fox"


def test_the_rest_of_a_character_that_a_prompt_began_brings_none_of_the_prompt(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    *prompt, rest = tiny_tokenizer.encode("secret \U0001f98e")
    detokenizer = Detokenizer(tiny_tokenizer, prompt, ())
    assert (detokenizer.push(rest), detokenizer.flush()) == ("", "\ufffd")


@given(
    tokens=st.lists(st.sampled_from(["a", "b", byte(97)]), max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3),
    may_stop=st.integers(0, 30),
)
def test_stop_strings_are_found_and_held_back_as_by_looking_everywhere(
    byte_fallback: PreTrainedTokenizerFast, tokens: list[str], stop: list[str], may_stop: int
) -> None:
    detokenizer = Detokenizer(byte_fallback, [5], tuple(stop))
    text = sent = ""
    for number, token in enumerate(tokens):
        sent += detokenizer.push(byte_fallback.convert_tokens_to_ids(token), number >= may_stop)
        text += "b" if token == "b" else "a"
        found = [(len(text) - len(one), one) for one in stop if text.endswith(one)]
        if found and number >= may_stop:
            position, by = min(found)
            assert (sent, detokenizer.stopped_by) == (text[:position], by)
            return
        starts = [one[:length] for one in stop for length in range(len(one))]
        held_back = max((len(one) for one in starts if text.endswith(one)), default=0)
        assert sent == text[: len(text) - held_back]
    assert sent + detokenizer.flush() == text


@pytest.mark.parametrize("stop", ["c" * 10**6, "a" * 10**6 + "b", ("a" * 1000 + "b") * 1000])
def test_a_long_stop_string_costs_no_more_than_the_text(
    byte_fallback: PreTrainedTokenizerFast, stop: str
) -> None:
    answer = (["a"] * 999 + ["b"]) * 5
    begun = time.thread_time()
    text = "".join(pieces_of(byte_fallback, ["a"], answer, stop))
    assert time.thread_time() - begun < 0.5
    assert text == "".join(answer)


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
