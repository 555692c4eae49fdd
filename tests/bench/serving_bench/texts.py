"""Where the prompts' text comes from."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from pathlib import Path

ROOT = Path(__file__).parents[3]
DOCUMENTS = 200  # of each file of the data folder


def find_text(named: Path | None) -> tuple[str, str]:
    """A text to cut prompts from, and what to call it in the report.

    The file that is named; else the test split of the data folder (`CHAMELEON_DATA`, or
    ../shared/data beside the repository); else the help texts that come with Python.
    """
    if named is not None:
        return named.read_text(encoding="utf-8"), named.name
    files = sorted(data_folder().glob("*.test.jsonl.gz"))
    if files:
        texts = [text for file in files for text in documents(file, DOCUMENTS)]
        return "\n\n".join(texts), f"test split of the data folder, {len(files)} domains"
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()), "Python's help texts (pydoc_data.topics)"


def data_folder() -> Path:
    """Where it is said to be, or where it lies beside the repository."""
    return Path(os.environ.get("CHAMELEON_DATA", ROOT.parent / "shared" / "data"))


def documents(file: Path, count: int) -> list[str]:
    """The first ones of a file of the data folder."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in itertools.islice(lines, count)]
