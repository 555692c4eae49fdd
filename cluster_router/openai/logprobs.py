"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from cluster_router.wire.types import TokenLogprob

FLOOR = -9999.0
"""What OpenAI reports for "very unlikely"; JSON has no minus infinity."""


class LegacyLogprobs:
    """The shape of completions: parallel lists.

    `text_offset` counts characters from the start of the choice's text. A character whose bytes
    are spread over several tokens belongs to the last of them, so the offsets follow the bytes.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(self, entries: Iterable[TokenLogprob]) -> dict[str, list[Any]]:
        """Lay out the next `entries`; the first token of a prompt has null for its numbers."""
        tokens, values, tops, offsets = [], [], [], []
        for entry in entries:
            tokens.append(label(entry))
            values.append(None if entry.logprob is None else finite(entry.logprob))
            tops.append(None if entry.logprob is None else _by_text(entry))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(entry.raw))
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def chat_logprobs(entries: Iterable[TokenLogprob], top: int) -> dict[str, Any]:
    """The shape of chat: one object a token, with its `top` most likely alternatives."""
    content = [
        {**_described(entry), "top_logprobs": [_described(other) for other in entry.top[:top]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def label(entry: TokenLogprob) -> str:
    """The token's text, or `bytes:` and its bytes where they are only part of a character."""
    if "\ufffd" not in entry.text:
        return entry.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.raw)


def finite(logprob: float | None) -> float:
    """`logprob` as JSON can carry it."""
    return FLOOR if logprob is None else max(FLOOR, logprob)


def _by_text(entry: TokenLogprob) -> dict[str, float]:
    """Alternatives by text, the chosen token among them; of equal texts the likeliest counts."""
    best: dict[str, float] = {}
    for other in (*entry.top, entry):
        text, value = label(other), finite(other.logprob)
        best[text] = max(value, best.get(text, value))
    return best


def _described(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": label(entry), "logprob": finite(entry.logprob), "bytes": list(entry.raw)}
