"""Chat logs in JSON lines to the data folder that training reads.

python deploy/examples/logs_to_data.py logs.jsonl data --domain team --source conversation

Each exchange of a user's turn and the answer to it becomes a document. Both options name fields of
a log: the one whose value is the document's domain, and the one by which documents stay together
when they are divided into splits (a conversation, a customer).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

SEPARATOR = "\n\nAnswer:\n"
"""Between question and answer; name it under `data.dialogues` of the training config."""


def documents(log: dict[str, Any]) -> Iterator[str]:
    """Every question with its answer."""
    turns = [turn for turn in log["messages"] if isinstance(turn.get("content"), str)]
    for asked, answered in pairwise(turns):
        if (asked["role"], answered["role"]) == ("user", "assistant"):
            yield f"{asked['content'].strip()}{SEPARATOR}{answered['content'].strip()}"


def convert(logs: Path, folder: Path, domain: str, source: str) -> dict[str, int]:
    """Write `folder`; returns how many documents each domain has."""
    found: dict[str, list[str]] = defaultdict(list)
    with logs.open(encoding="utf-8") as lines:
        for line in lines:
            log = json.loads(line)
            name = re.sub(r"\W+", "_", str(log.get(domain, "all"))).lower()
            for text in documents(log):
                found[name].append(json.dumps({"text": text, "source": str(log.get(source, ""))}))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {name: len(rows) for name, rows in found.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--domain", default="domain", help="field whose value is the domain")
    parser.add_argument("--source", default="source", help="field that keeps documents together")
    options = parser.parse_args()
    counts = convert(options.logs, options.folder, options.domain, options.source)
    for name, count in sorted(counts.items()):
        print(f"{options.folder / name}.jsonl: {count} documents")


if __name__ == "__main__":
    main()
