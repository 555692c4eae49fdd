"""Tokens to text, piece by piece, with stop strings."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from cluster_router.wire.types import TokenLogprob

_CONTEXT = 6
"""Prompt tokens shown to the decoder first, so that the first word keeps its space."""

_BROKEN = "\ufffd"
"""What decoders write for bytes that are no character, or no whole one yet."""


class TokenTexts:
    """Text and bytes of single tokens, as logprobs show them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._alphabet = _byte_alphabet()
        self.of = lru_cache(maxsize=65536)(self._of)

    def logprob(
        self, token: int, logprob: float | None, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        """A TokenLogprob with its text filled in."""
        text, raw = self.of(token)
        return TokenLogprob(token, text, raw, logprob, top)

    def _of(self, token: int) -> tuple[str, bytes]:
        text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if _BROKEN not in text:
            return text, text.encode()
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if piece.startswith("<0x") and piece.endswith(">"):
            return text, bytes([int(piece[3:-1], 16)])
        if all(character in self._alphabet for character in piece):
            return text, bytes(self._alphabet[character] for character in piece)
        return text, text.encode()


class Detokenizer:
    """Text of one answer as its tokens arrive.

    Text that may still turn out to be the start of a stop string, or of a character whose bytes
    are not all here, is held back.

    Args:
        tokenizer: a fast tokenizer.
        prompt: the prompt's tokens, context for the first token's text.
        stop: strings that end the answer; they are not part of it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stop: tuple[str, ...]
    ) -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        self._stops = [_Stop(one) for one in stop]
        self._text = ""  # with stop strings; without any, nothing is held back
        self._sent = 0
        self.stopped_by: str | None = None
        self._unread: list[int] = []
        self._go_on_after(prompt[-_CONTEXT:])

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add a token and return the text that is now certain; sets `stopped_by` at a stop string.

        With `may_stop` false a stop string is text like any other.
        """
        self._unread.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_BROKEN):
            return ""
        self._go_on_after(self._unread)
        if not self._stops:
            return piece
        start = len(self._text)
        self._text += piece
        ends = [(one.text, one.feed(piece)) for one in self._stops]
        found = [(start + end - len(stop), stop) for stop, end in ends if end is not None]
        if may_stop and found:
            position, self.stopped_by = min(found)
            self._text = self._text[:position]
            return self._send(position)
        held_back = max((one.matched for one in self._stops), default=0)
        return self._send(len(self._text) - held_back)

    def flush(self) -> str:
        """The text still held back, once the answer is over."""
        piece = ""
        if self.stopped_by is None and self._unread:
            piece = self._piece()  # bytes of an unfinished character
            self._unread = []
        if not self._stops:
            return piece
        self._text += piece
        return self._send(len(self._text))

    def _go_on_after(self, tokens: list[int]) -> None:
        """Take the next tokens' text to be what they add to that of `tokens`."""
        self._context, self._before = tokens, self._decode(tokens)
        self._unread = []
        if self._before.endswith(_BROKEN):
            # The next tokens may complete a character, which is no addition to this text.
            self._context, self._before = [], ""

    def _piece(self) -> str:
        """Text of the tokens that none was made of yet."""
        whole = self._decode([*self._context, *self._unread])
        if whole.startswith(self._before):
            return whole[len(self._before) :]
        # Tokens of single bytes in a row are decoded as one: a wrong byte breaks even characters
        # before it that were whole.
        return self._decode(self._unread)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=True)
        return text

    def _send(self, end: int) -> str:
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


class _Stop:
    """How much of a stop string a growing text ends with, by Knuth's, Morris's and Pratt's way.

    The work is linear in the text, however long the stop string is.

    Attributes:
        text: the stop string.
        matched: how many characters of its beginning, but not all, the text ends with.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        # Of the first n characters: the longest end, but not all, that they also begin with.
        # Known as far as the text has matched, so that a long stop string costs nothing before.
        self._borders = [0, 0]

    def feed(self, piece: str) -> int | None:
        """Where in `piece`, the text's next, the stop string first ends; None where it does not."""
        if not self.matched and self.text[0] not in piece:
            return None
        end = None
        for index, character in enumerate(piece, 1):
            self.matched = self._extended(self.matched, character)
            if self.matched == len(self._borders):
                self._borders.append(self._extended(self._borders[-1], character))
            if self.matched == len(self.text):
                end = end or index
                self.matched = self._borders[self.matched]
        return end

    def _extended(self, matched: int, character: str) -> int:
        """What is matched of the stop string with one character more."""
        while matched and self.text[matched] != character:
            matched = self._borders[matched]
        return matched + (self.text[matched] == character)


def _byte_alphabet() -> dict[str, int]:
    """Characters by which byte-level BPE vocabularies write bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet
