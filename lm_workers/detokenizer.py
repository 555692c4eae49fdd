"""Tokens to text, piece by piece, with stop strings."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from cluster_router.wire.types import TokenLogprob

_CONTEXT = 6
"""Prompt tokens shown to the decoder first, so that the first word keeps its space."""


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
        if "\ufffd" not in text:
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
        self._stream = DecodeStream(ids=prompt[-_CONTEXT:], skip_special_tokens=True)
        self._context = prompt[-_CONTEXT:]
        self._tokens: list[int] = []
        self._stop = stop
        self._text = ""
        self._sent = 0
        self.stopped_by: str | None = None

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add a token and return the text that is now certain; sets `stopped_by` at a stop string.

        With `may_stop` false a stop string is text like any other.
        """
        self._tokens.append(token)
        piece = self._stream.step(self._backend, token)
        if not piece:
            return ""
        self._text += piece
        if may_stop and self._find_stop(len(piece)):
            return self._send(len(self._text))
        return self._send(len(self._text) - self._held_back())

    def flush(self) -> str:
        """The text still held back, once the answer is over."""
        if self.stopped_by is None:
            whole = self._decode([*self._context, *self._tokens])
            start = len(self._decode(self._context))
            # Bytes of an unfinished character: the stream never gives them, the whole does.
            self._text += whole[start + len(self._text) :]
        return self._send(len(self._text))

    def _decode(self, tokens: list[int]) -> str:
        return str(self._backend.decode(tokens, skip_special_tokens=True))

    def _send(self, end: int) -> str:
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _find_stop(self, fresh: int) -> bool:
        """Cut the text at the earliest stop string that ends within the last `fresh` characters."""
        found: list[tuple[int, str]] = []
        for stop in self._stop:
            start = max(0, len(self._text) - fresh - len(stop) + 1)
            position = self._text.find(stop, start)
            if position >= 0:
                found.append((position, stop))
        if not found:
            return False
        position, self.stopped_by = min(found)
        self._text = self._text[:position]
        return True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


def _byte_alphabet() -> dict[str, int]:
    """Characters by which byte-level BPE vocabularies write bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet
