"""The sources in a data folder, told by the names of its files."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import NamedTuple

from cluster_router.wire.errors import ConfigError
from training.data.documents import Split
from training.data.sources import SPLIT_NAMES, Source, shares_of
from training.data.tables import Columns, JsonLines, Parquet, Table, TextFolder

REGRESSION_FOLDER = "wikitext-2"
"""A subfolder of running text that only evaluation reads; it is no domain."""
RUNNING_TEXTS: dict[Split, tuple[str, ...]] = {
    "train": ("train.raw.txt", "wiki.train.raw", "train.txt", "wiki.train.tokens"),
    "validation": ("valid.raw.txt", "wiki.valid.raw", "valid.txt", "wiki.valid.tokens"),
    "test": ("test.raw.txt", "wiki.test.raw", "test.txt", "wiki.test.tokens"),
}
"""Names under which its files travel; the first that is there is read."""

_SPLITS = "|".join(SPLIT_NAMES)
_NAME = re.compile(
    rf"(?:(?P<alone>{_SPLITS})|(?P<domain>.+?)(?:\.(?P<split>{_SPLITS}))?)"
    r"\.(?P<kind>jsonl|jsonl\.gz|parquet)"
)
_ACCEPTED = (
    "<domain>.<split>.jsonl.gz, <domain>.jsonl[.gz], <domain>.parquet, "
    "and folders <domain>/ of .txt, .md, .jsonl or .jsonl.gz files"
)
_PARTS = (".jsonl", ".jsonl.gz")
_logger = logging.getLogger(__name__)


class _Found(NamedTuple):
    """`domain` None: a column of the table names it."""

    table: Table
    domain: str | None
    split: Split | None


def running_text(data: Path, split: Split) -> Path | None:
    """The running text of a data folder, None where there is none."""
    paths = [data / REGRESSION_FOLDER / name for name in RUNNING_TEXTS[split]]
    return next((path for path in paths if path.is_file()), None)


def folder_sources(folder: Path, columns: Columns) -> list[Source]:
    """Sources of the files in `folder`, ordered by name.

    Raises:
        ConfigError: there is no such folder, or nothing in it that can be read.
    """
    if not folder.is_dir():
        what = "is a file; name the folder it is in" if folder.exists() else "does not exist"
        raise ConfigError(
            f"data folder {folder} {what} (--data takes a folder of text by domain, or "
            "hub:<organisation>/<dataset>)",
            "data",
        )
    found = [one for path in sorted(folder.iterdir()) for one in _find(path, columns)]
    # Where nothing at all has the column, reading it says which setting to change.
    found = [one for one in found if not _is_stray(one.table, folder, columns)] or found
    if not found:
        raise ConfigError(f"data folder {folder} holds no data; it may hold {_ACCEPTED}", "data")
    present: dict[str | None, set[Split]] = {}
    for _, domain, split in found:
        if split is not None:
            present.setdefault(domain, set()).add(split)
    return [
        Source(table, columns, domain, shares_of(split, present.get(domain, set())))
        for table, domain, split in found
    ]


def _is_stray(table: Table, folder: Path, columns: Columns) -> bool:
    """Whether it only lies in a subfolder, raw data perhaps, and has no texts in it."""
    if not isinstance(table, JsonLines) or table.path.parent == folder:
        return False
    present = table.columns()
    if not present or columns.text in present:
        return False
    _logger.warning(
        "%s is left out: it has no column %r (data.text_column), only %s",
        table.name,
        columns.text,
        ", ".join(present),
    )
    return True


def _find(path: Path, columns: Columns) -> list[_Found]:
    if path.name.startswith("."):
        return []
    if match := _NAME.fullmatch(path.name):
        domain = match["domain"] or path.parent.name
        table = _Found(
            Parquet(path) if match["kind"] == "parquet" else JsonLines(path),
            domain if columns.domain is None else None,
            _split(match),
        )
        return [table]
    if not path.is_dir() or path.name == REGRESSION_FOLDER:
        return []
    parts = [part for part in sorted(path.iterdir()) if part.name.endswith(_PARTS)]
    domain = path.name if columns.domain is None else None
    found = [_Found(JsonLines(part), domain, _split(_NAME.fullmatch(part.name))) for part in parts]
    if (text := TextFolder(path)).files():
        found.append(_Found(text, path.name, None))
    return found


def _split(match: re.Match[str] | None) -> Split | None:
    """The split that a file's name tells."""
    name = None if match is None else match["alone"] or match["split"]
    return None if name is None else SPLIT_NAMES[name]
