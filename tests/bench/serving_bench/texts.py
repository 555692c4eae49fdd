"""Where the prompts' text comes from."""

from __future__ import annotations

import gzip
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
    folder = Path(os.environ.get("CHAMELEON_DATA", ROOT.parent / "shared" / "data"))
    files = sorted(folder.glob("*.test.jsonl.gz"))
    if files:
        texts = [text for file in files for text in _documents(file)]
        return "\n\n".join(texts), f"test split of the data folder, {len(files)} domains"
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()), "Python's help texts (pydoc_data.topics)"


def _documents(file: Path) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(DOCUMENTS), lines, strict=False)]
