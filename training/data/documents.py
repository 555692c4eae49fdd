"""Documents, and how they are read whatever they are stored in."""

from __future__ import annotations

import fnmatch
import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cluster_router.wire.errors import ConfigError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MIN_DOCUMENTS = 2
"""A domain needs this many documents in a split: no interval can be given for fewer."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its domain.

    `group` names the work it is a part of, empty where it stands alone. Where the data has no
    splits of its own, all of a group goes into one.
    """

    text: str
    domain: str
    group: str = ""


class Reader(Protocol):
    """Documents by domain and split, each text in one place only."""

    def domains(self) -> list[str]:
        """Names of the domains, sorted."""
        ...

    def count(self, domain: str, split: Split) -> int:
        """How many documents `documents` gives."""
        ...

    def documents(self, domain: str, split: Split) -> Iterator[Document]:
        """The documents of one split of a domain, one after the other.

        Raises:
            ConfigError: a file cannot be read, or holds what is not a document.
        """
        ...


def select(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of `names` that match any of the shell-style `patterns`."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def require_documents(reader: Reader, domain: str, split: Split) -> None:
    """Check that figures can be given.

    Raises:
        ConfigError: a split of the domain has fewer than two documents.
    """
    count = reader.count(domain, split)
    if count < MIN_DOCUMENTS:
        raise ConfigError(
            f"the {split} split of {domain!r} holds {count} document(s), at least {MIN_DOCUMENTS} "
            f"are needed; add documents or exclude the domain {domain!r} (of data without splits "
            "of its own, a tenth goes into validation and a tenth into test)",
            "data",
        )


def read_documents(reader: Reader, domain: str, split: Split, limit: int) -> list[Document]:
    """Up to `limit` documents of a domain, spread over all it has.

    The order follows from the texts alone, and a larger limit only appends, so runs that differ in
    the limit share their first documents. No more than `limit` are held at a time.

    Raises:
        ConfigError: a file is unreadable, or there are fewer than two documents.
    """
    require_documents(reader, domain, split)
    return spread(reader.documents(domain, split), limit)


def spread(documents: Iterable[Document], limit: int) -> list[Document]:
    """Up to `limit` of `documents`, chosen and ordered by a hash of their texts."""
    return heapq.nsmallest(limit, documents, key=_place)


def _place(document: Document) -> bytes:
    return hashlib.blake2b(document.text.encode(), digest_size=8).digest()
