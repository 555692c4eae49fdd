"""Rows of text in the formats that are read: JSON lines, Parquet, folders of text files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster_router.wire.errors import ConfigError
from training.data.optional import load

Row = Mapping[str, Any]
_BATCH = 256
"""Rows of a columnar file that are held at a time."""
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read. `domain` None: the file's name is the domain."""

    text: str
    group: str
    domain: str | None = None

    def of(self, present: Sequence[str], name: str) -> list[str]:
        """Those to read from a table `name` that has the columns `present`.

        Raises:
            ConfigError: there is no text, or no domain where one is asked for.
        """
        for column, setting in ((self.text, "text_column"), (self.domain, "domain_column")):
            if column is not None and column not in present:
                raise ConfigError(
                    f"{name} has no column {column!r}, only {', '.join(present) or 'none at all'}; "
                    f"set data.{setting}",
                    f"data.{setting}",
                )
        wanted = (self.text, self.group, self.domain)
        return [column for column in wanted if column is not None and column in present]


class Table(Protocol):
    """Where rows come from; reading it twice gives the same rows."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    def stamp(self) -> str:
        """Changes whenever the rows may have changed."""
        ...

    def count(self) -> int:
        """How many rows there are, or about as many: progress bars use it."""
        ...

    def rows(self, columns: Columns) -> Iterator[tuple[int, Row]]:
        """Rows with at least the text, each with its number from 1.

        Raises:
            ConfigError: it cannot be read, or a column is missing.
        """
        ...


def stamp_files(root: Path, paths: Sequence[Path]) -> str:
    """Names, sizes and times of change of `paths`, named from `root`."""
    facts = []
    for path in paths:
        status = path.stat()
        facts.append(f"{path.relative_to(root)}:{status.st_size}:{status.st_mtime_ns}")
    return "\n".join(facts)


def unreadable(name: str, error: Exception) -> ConfigError:
    """What is raised where a file cannot be read."""
    return ConfigError(
        f"cannot read {name}: {error}; repair the file or take it out of the data folder", "data"
    )


@dataclass(frozen=True)
class JsonLines:
    """A file of one JSON object a line, gzipped where its name says so. Blank lines are skipped."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def stamp(self) -> str:
        """Of the file."""
        return stamp_files(self.path.parent, [self.path])

    def count(self) -> int:
        """Lines."""
        return sum(1 for _ in self._lines())

    def columns(self) -> list[str]:
        """Of the first row.

        Raises:
            ConfigError: it cannot be read.
        """
        for number, line in enumerate(self._lines(), start=1):
            if not line.isspace():
                return list(self._parse(number, line))
        return []

    def rows(self, columns: Columns) -> Iterator[tuple[int, Row]]:
        """One row a line."""
        for number, line in enumerate(self._lines(), start=1):
            if line.isspace():
                continue
            row = self._parse(number, line)
            columns.of(list(row), f"{self.path} line {number}")
            yield number, row

    def _lines(self) -> Iterator[bytes]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        try:
            with opener(self.path, "rb") as lines:
                yield from lines
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(self.name, error) from error

    def _parse(self, number: int, line: bytes) -> Row:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{self.path} line {number} is not JSON: {error}", "data") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f'{self.path} line {number} is not an object like {{"text": ...}}', "data"
            )
        return row


@dataclass(frozen=True)
class Parquet:
    """A Parquet file, or a folder of them that one dataset was written to."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def stamp(self) -> str:
        """Of the files."""
        paths = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        return stamp_files(self.path.parent, paths)

    def count(self) -> int:
        """Rows, from the files' own count."""
        with self._readable():
            return int(self._dataset().count_rows())

    def rows(self, columns: Columns) -> Iterator[tuple[int, Row]]:
        """Rows in their order, a few hundred held at a time."""
        number = 0
        with self._readable():
            dataset = self._dataset()
            # One thread and one fragment at a time: rows keep their order, and memory stays small.
            batches = dataset.to_batches(
                columns=columns.of(dataset.schema.names, self.name),
                batch_size=_BATCH,
                batch_readahead=1,
                fragment_readahead=1,
                use_threads=False,
            )
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield number, row

    def _dataset(self) -> Any:
        return load("pyarrow.dataset", "pyarrow", "Parquet").dataset(self.path, format="parquet")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, load("pyarrow", "pyarrow", "Parquet").ArrowException) as error:
            raise unreadable(self.name, error) from error


@dataclass(frozen=True)
class TextFolder:
    """A folder of text files, at any depth; each file is a row."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def files(self) -> list[Path]:
        """The text files, sorted; hidden ones are left out."""
        return [
            path
            for path in sorted(self.path.rglob("*"))
            if path.suffix.lower() in TEXT_SUFFIXES
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        ]

    def stamp(self) -> str:
        """Of the text files."""
        return stamp_files(self.path.parent, self.files())

    def count(self) -> int:
        """Files."""
        return len(self.files())

    def rows(self, columns: Columns) -> Iterator[tuple[int, Row]]:
        """One row a file."""
        for number, path in enumerate(self.files(), start=1):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise unreadable(str(path), error) from error
            yield number, {columns.text: text}
