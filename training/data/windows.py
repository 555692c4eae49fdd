"""Windows: documents as tokens, cut into context and scored tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster_router.prompts import leading_tokens
from cluster_router.wire.errors import ConfigError
from training.data.documents import (
    MIN_DOCUMENTS,
    Document,
    Reader,
    Split,
    read_documents,
    require_documents,
)
from training.data.meter import meter

_CHARACTERS_PER_TOKEN = 16
"""Far more than a token has in running text."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Token ids under `input_ids`."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A stretch of one document, mostly its start, as tokens.

    Attributes:
        tokens: int32 [n]; the first `context` of them are context, the rest are scored.
        context: how many tokens come before the first scored one, at least 1.
        scored_bytes: UTF-8 length of the scored tokens' text.
        lead: how many of the first tokens are the tokenizer's own, in front of any text.
    """

    tokens: NDArray[np.int32]
    context: int
    domain: str
    scored_bytes: int
    lead: int = 0

    @property
    def context_tokens(self) -> NDArray[np.int32]:
        """int32 [context], all that the model reads before what is scored."""
        return self.tokens[: self.context]

    @property
    def content_tokens(self) -> NDArray[np.int32]:
        """int32 [context - lead], all that assignment and conditioning may see."""
        return self.tokens[self.lead : self.context]

    @property
    def targets(self) -> NDArray[np.int32]:
        """int32 [scored], the tokens that are predicted."""
        return self.tokens[self.context :]

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - self.context


@dataclass(frozen=True)
class WindowCutter:
    """Cuts documents into windows: `context` tokens first, then up to `scored` scored tokens.

    A document shorter than twice the context gives half of its tokens to each part. The model reads
    each window alone, as it would a prompt, so `lead` comes before each, wherever it is cut from.
    """

    tokenizer: Tokenizer
    context: int
    scored: int

    @cached_property
    def lead(self) -> tuple[int, ...]:
        """Token ids that the tokenizer puts before any text; in no count of `context`."""
        return leading_tokens(self.tokenizer)

    @property
    def longest(self) -> int:
        """Most tokens in a window."""
        return len(self.lead) + self.context + self.scored

    def cut(self, document: Document) -> Window | None:
        """The first window of a document, None where it has fewer than two tokens."""
        return next(iter(self.windows(document, 1)), None)

    def windows(self, document: Document, most: int) -> list[Window]:
        """Up to `most` windows of a document, one after the other, that share no token.

        The first is the same whatever `most` is. A further one has a whole context and at least as
        many scored tokens, all from where the one before it ended.
        """
        size = self.context + self.scored
        ids = self._start(document.text, most * size)
        if len(ids) < 2:
            return []
        windows = [self._window(ids, min(self.context, len(ids) // 2), document.domain)]
        starts = range(size, len(ids) - 2 * self.context + 1, size)
        for start in starts[: most - 1]:
            windows.append(self._window(ids[start:], self.context, document.domain))
        return windows

    def cut_split(
        self,
        reader: Reader,
        split: Split,
        domains: Sequence[str],
        limit: int,
        windows_per_document: int = 1,
    ) -> list[Window]:
        """Windows of up to `limit` documents of each domain, domain after domain.

        In a domain the first windows of all documents come first, so that what is cached for those
        is found again whatever `windows_per_document` is.

        Raises:
            ConfigError: a domain cannot be read, or has too little text.
        """
        for domain in domains:
            require_documents(reader, domain, split)
        total = sum(min(limit, reader.count(domain, split)) for domain in domains)
        windows: list[Window] = []
        with meter(f"tokenise {split}", total, "tok") as advance:
            for domain in domains:
                first, further = [], []
                for document in read_documents(reader, domain, split, limit):
                    cut = self.windows(document, windows_per_document)
                    first.extend(cut[:1])
                    further.extend(cut[1:])
                    advance(sum(len(window.tokens) for window in cut))
                if len(first) < MIN_DOCUMENTS:
                    raise ConfigError(
                        f"only {len(first)} document(s) in the {split} split of {domain!r} are "
                        f"longer than a token, at least {MIN_DOCUMENTS} are needed; "
                        f"add longer documents or exclude the domain {domain!r}",
                        "data",
                    )
                windows += first + further
        return windows

    def cut_running_text(self, path: Path, name: str, count: int) -> list[Window]:
        """`count` full windows spread evenly over one text file, none where the file is absent."""
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        ids = self._encode(text)
        last = len(ids) - self.context - self.scored
        starts = np.linspace(0, last, count).astype(int).tolist() if last >= 0 else []
        return [self._window(ids[start:], self.context, name) for start in starts]

    def _start(self, text: str, tokens: int) -> list[int]:
        """At least the first `tokens` token ids of a text of any length, all of a short one."""
        length = tokens * _CHARACTERS_PER_TOKEN
        while True:
            ids = self._encode(text[:length])
            # The cut itself may have changed the last few tokens.
            if length >= len(text) or len(ids) >= tokens + _CHARACTERS_PER_TOKEN:
                return ids
            length *= 2

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _window(self, ids: list[int], context: int, domain: str) -> Window:
        ids = ids[: context + self.scored]
        text = self.tokenizer.decode(ids[context:])
        lead, size = self.lead, len(text.encode())
        tokens = np.array([*lead, *ids], np.int32)
        return Window(tokens, len(lead) + context, domain, size, len(lead))
