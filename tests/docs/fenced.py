"""What the tests read in Markdown: fenced blocks, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>[a-z ]+) -->\n *)?```(?P<language>\w*)[^\n]*\n"
    r"(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)[^)]*\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, and the comment above it."""

    page: Path
    line: int
    language: str
    mark: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page,
            text[: match.start("language")].count("\n") + 1,
            match["language"],
            match["mark"] or "",
            re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
        )
        for match in _FENCE.finditer(text)
    ]


def links(page: Path) -> list[str]:
    """Targets outside code that are neither addresses nor anchors of the page itself."""
    prose = re.sub(r"`[^`]*`", "", _FENCE.sub("", page.read_text()))
    targets = [match["target"] for match in _LINK.finditer(prose)]
    return [one for one in targets if not re.match(r"[a-z]+:|#", one)]
