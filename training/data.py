"""Documents: reading a folder of text by domain, and cutting each into context and scored tokens.

A data folder holds `<domain>.<split>.jsonl.gz` for the splits train, validation and test; each line
is an object with a `text`. What must not be in two splits at once is the folder's concern.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster_router.wire.errors import ConfigError

Split = Literal["train", "validation", "test"]
MIN_DOCUMENTS = 2
"""A domain needs this many documents in a split: no interval can be given for fewer."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Token ids under `input_ids`."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`."""
        ...


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its domain."""

    text: str
    domain: str


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The start of one document, as tokens.

    Attributes:
        tokens: int32 [n]; the first `context` of them are context, the rest are scored.
        context: how many tokens come before the first scored one, at least 1.
        scored_bytes: UTF-8 length of the scored tokens' text.
    """

    tokens: NDArray[np.int32]
    context: int
    domain: str
    scored_bytes: int

    @property
    def context_tokens(self) -> NDArray[np.int32]:
        """int32 [context], all that assignment and conditioning may see."""
        return self.tokens[: self.context]

    @property
    def targets(self) -> NDArray[np.int32]:
        """int32 [scored], the tokens that are predicted."""
        return self.tokens[self.context :]

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - self.context


def domains_in(folder: Path, split: Split) -> list[str]:
    """Names of the domains that have a file for `split`, sorted.

    Raises:
        ConfigError: the folder is missing or holds no such file.
    """
    if not folder.is_dir():
        raise ConfigError(f"data folder {folder} does not exist; name one with --data", "data")
    suffix = f".{split}.jsonl.gz"
    names = sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))
    if not names:
        raise ConfigError(
            f"data folder {folder} holds no <domain>{suffix}; expected one file a domain", "data"
        )
    return names


def select(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of `names` that match any of the shell-style `patterns`."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def read_documents(folder: Path, domain: str, split: Split, limit: int) -> list[Document]:
    """Up to `limit` documents of a domain, spread over the whole file.

    The order follows from the texts alone, and a larger limit only appends, so runs that differ in
    the limit share their first documents.

    Raises:
        ConfigError: the file is missing, unreadable, or holds fewer than two documents.
    """
    path = folder / f"{domain}.{split}.jsonl.gz"
    documents: list[Document] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                documents.append(_parse(line, domain, path, number))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", "data") from error
    if len(documents) < MIN_DOCUMENTS:
        raise ConfigError(
            f"{path} holds {len(documents)} document(s), at least {MIN_DOCUMENTS} are needed; "
            f"add documents or exclude the domain {domain!r}",
            "data",
        )
    documents.sort(key=lambda document: _digest(document.text))
    return documents[:limit]


def _parse(line: str, domain: str, path: Path, number: int) -> Document:
    try:
        row = json.loads(line)
        text = row["text"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} line {number} is not a document: {error}", "data") from error
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{path} line {number} has no text", "data")
    return Document(text, domain)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class WindowCutter:
    """Cuts documents into windows: `context` tokens first, then up to `scored` scored tokens.

    A document shorter than twice the context gives half of its tokens to each part.
    """

    tokenizer: Tokenizer
    context: int
    scored: int

    def cut(self, document: Document) -> Window | None:
        """The window of a document, None where it has fewer than two tokens."""
        ids = self.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) < 2:
            return None
        return self._window(ids, min(self.context, len(ids) // 2), document.domain)

    def cut_split(
        self, folder: Path, split: Split, domains: Sequence[str], limit: int
    ) -> list[Window]:
        """Windows of up to `limit` documents of each domain, domain after domain.

        Raises:
            ConfigError: a domain cannot be read.
        """
        documents = (
            document
            for domain in domains
            for document in read_documents(folder, domain, split, limit)
        )
        return [window for document in documents if (window := self.cut(document)) is not None]

    def cut_running_text(self, path: Path, name: str, count: int) -> list[Window]:
        """`count` full windows spread evenly over one text file, none where the file is absent."""
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        last = len(ids) - self.context - self.scored
        starts = np.linspace(0, last, count).astype(int).tolist() if last >= 0 else []
        return [self._window(ids[start:], self.context, name) for start in starts]

    def _window(self, ids: list[int], context: int, domain: str) -> Window:
        ids = ids[: context + self.scored]
        text = self.tokenizer.decode(ids[context:])
        return Window(np.array(ids, np.int32), context, domain, len(text.encode()))
