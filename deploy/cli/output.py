"""What commands print: JSON for programs, tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def print_json(value: Any) -> None:
    """Print `value`, indented, as UTF-8."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None
) -> Table:
    """A table; numbers stand on the right, and nothing in a cell is taken for markup."""
    filled = [[_cell(one) for one in row] for row in rows]
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for place, head in enumerate(heads):
        numbers = all(_is_number(row[place].plain) for row in filled)
        made.add_column(head, justify="right" if numbers and filled else "left", overflow="fold")
    for row in filled:
        made.add_row(*row)
    return made


def show(*parts: Any) -> None:
    """Print tables and text to standard output."""
    console = Console(highlight=False)
    for part in parts:
        console.print(part)


def _cell(value: object) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}")
    return Text("" if value is None else str(value))


def _is_number(text: str) -> bool:
    return text.replace(",", "").replace(".", "").lstrip("+-").isdigit() or text in {"", "-"}
