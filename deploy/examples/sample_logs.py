"""Chat logs to try the tutorial with, made of this project's own source and documents.

python deploy/examples/sample_logs.py logs.jsonl

Two kinds of conversations, as an assistant inside a company would have them: what a function looks
like, and what the handbook says. One JSON object a line, `messages` as OpenAI's API has them.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_LENGTHS = range(400, 4000)
"""Characters of an answer that is neither trivial nor longer than a window."""

Log = dict[str, Any]


def functions() -> Iterator[Log]:
    """For each documented class or function of the source: its docstring asks, its code answers."""
    for path in sorted(ROOT.glob("*/**/*.py")):
        if not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts:
            source = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    question = ast.get_docstring(node)
                    answer = ast.get_source_segment(source, node) or ""
                    if question and len(answer) in _LENGTHS:
                        about = f"Show me {node.name} of {path.stem}. {question}"
                        yield _log("code", str(path.relative_to(ROOT)), about, answer)


def sections() -> Iterator[Log]:
    """For each section of the documents: its heading asks, its text answers."""
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")]):
        if ".venv" not in path.parts:
            parts = re.split(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            for heading, text in zip(parts[1::2], parts[2::2], strict=True):
                if len(text) in _LENGTHS:
                    about = f"What does the handbook say of {path.stem}, {heading}?"
                    yield _log("handbook", str(path.relative_to(ROOT)), about, text.strip())


def _log(team: str, conversation: str, question: str, answer: str) -> Log:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"team": team, "conversation": conversation, "messages": turns}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python deploy/examples/sample_logs.py FILE")
    with Path(sys.argv[1]).open("w", encoding="utf-8") as out:
        for log in (*functions(), *sections()):
            out.write(json.dumps(log) + "\n")
