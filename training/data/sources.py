"""Sources: the documents of one table, and which split each of them goes into."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from cluster_router.wire.errors import ConfigError
from training.data.documents import Document, Split
from training.data.tables import Columns, Row, Table

Shares = tuple[tuple[Split, float], ...]
"""Splits that a table is divided into, and the share of each; they sum to 1."""
HELD_BACK = 0.1
"""Share of the groups that goes into each of validation and test where they have to be made."""

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""What the splits are called in file names and in hub datasets."""


def shares_of(split: Split | None, present: set[Split]) -> Shares:
    """How to divide a table of `split`, None where it is of no split, beside those `present`.

    A validation or test split that is nowhere is made from the training documents.
    """
    if split not in (None, "train"):
        return ((split, 1.0),)
    missing: list[Split] = [
        name for name in ("validation", "test") if split is None or name not in present
    ]
    return (
        ("train", 1.0 - HELD_BACK * len(missing)),
        *((name, HELD_BACK) for name in missing),
    )


def text_key(text: str) -> bytes:
    """The same for texts that differ in nothing but white space."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Source:
    """One table as documents.

    Args:
        table: where the rows are.
        columns: which columns they are in.
        domain: of every document, None where a column names it.
        shares: the splits.
    """

    table: Table
    columns: Columns
    domain: str | None
    shares: Shares

    @property
    def divided(self) -> bool:
        """Whether documents are given to splits here, rather than by whoever wrote the data."""
        return len(self.shares) > 1

    def holds(self, split: Split) -> bool:
        """Whether documents of `split` may be in here."""
        return any(name == split for name, _ in self.shares)

    def stamp(self) -> str:
        """Changes whenever the documents or their splits may have changed."""
        return f"{self.table.stamp()}\n{self.columns}\n{self.domain}\n{self.shares}"

    def documents(self, split: Split) -> Iterator[Document]:
        """Documents of one split. Some may be empty.

        Raises:
            ConfigError: a row is not a document, or the table cannot be read.
        """
        for number, row in self.table.rows(self.columns):
            document = self._document(number, row)
            if self._split(document) == split:
                yield document

    def _document(self, number: int, row: Row) -> Document:
        text = row[self.columns.text]
        if text is None:
            text = ""
        if not isinstance(text, str) or not _encodable(text):
            raise ConfigError(
                f"{self.table.name} row {number}: {self.columns.text!r} is not text; "
                "correct the row or set data.text_column",
                "data.text_column",
            )
        value = row.get(self.columns.group)
        group = "" if value is None else str(value)
        return Document(text, self._domain(number, row), group.rpartition("#")[0] or group)

    def _domain(self, number: int, row: Row) -> str:
        if self.columns.domain is None or self.domain is not None:
            assert self.domain is not None
            return self.domain
        value = row[self.columns.domain]
        if value is None or value == "":
            raise ConfigError(
                f"{self.table.name} row {number}: {self.columns.domain!r} names no domain; "
                "correct the row or set data.domain_column",
                "data.domain_column",
            )
        return str(value)

    def _split(self, document: Document) -> Split:
        """By a hash of the group alone, so that adding documents moves none of the others."""
        if not self.divided:
            return self.shares[0][0]
        if document.group:
            key = hashlib.blake2b(document.group.encode(), digest_size=16).digest()
        else:
            key = text_key(document.text)
        place = int.from_bytes(key[:8]) / 2**64
        for split, share in reversed(self.shares):
            place -= share
            if place < 0:
                return split
        return self.shares[0][0]


def _encodable(text: str) -> bool:
    """Whether there is a byte sequence for it: JSON may hold half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
