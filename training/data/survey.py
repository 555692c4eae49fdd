"""What is in a data set, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from training.config import DataSettings
from training.data.documents import SPLITS, select
from training.data.inventory import Part
from training.data.licences import Licence
from training.data.meter import meter
from training.data.reader import SourceReader
from training.data.windows import Tokenizer

_UNKNOWN = "unknown"
_COUNTS = ("documents", "bytes", "empty", "exact", "near")


def survey(
    reader: SourceReader,
    settings: DataSettings,
    licences: Mapping[str, Licence],
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    """Figures by domain and split, JSON values only.

    Args:
        reader: of the data.
        settings: which domains are excluded or held out.
        licences: of domains, as far as they are known.
        tokenizer: counts the tokens of all documents; None leaves them out.

    Raises:
        ConfigError: tokens are counted and something cannot be read.
    """
    domains: dict[str, Any] = {
        name: {
            "use": _use(name, settings),
            "licence": licences[name].licence if name in licences else _UNKNOWN,
            "splits": {
                split: {count: getattr(part, count) for count in _COUNTS}
                for split, part in parts.items()
            },
        }
        for name, parts in reader.inventory.items()
    }
    if tokenizer is not None:
        _count_tokens(reader, domains, tokenizer)
    return {"near_duplicates_dropped": reader.near, "domains": domains}


def _use(name: str, settings: DataSettings) -> str:
    if select([name], settings.exclude):
        return "excluded"
    return "held out" if select([name], settings.holdout) else "trained on"


def _count_tokens(reader: SourceReader, domains: dict[str, Any], tokenizer: Tokenizer) -> None:
    parts: list[Part] = [p for splits in reader.inventory.values() for p in splits.values()]
    with meter("count tokens", sum(part.documents for part in parts), "tok") as advance:
        for name, facts in domains.items():
            for split, figures in facts["splits"].items():
                figures["tokens"] = 0
                for document in reader.documents(name, split):
                    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
                    figures["tokens"] += len(ids)
                    advance(len(ids))


def survey_table(figures: dict[str, Any], settings: DataSettings) -> str:
    """The figures as Markdown, aligned for a terminal, and what they mean for a run."""
    domains = figures["domains"]
    tokens = any("tokens" in part for facts in domains.values() for part in _parts(facts))
    header = ["domain", "use", *SPLITS, "bytes", *(["tokens"] if tokens else [])]
    header += ["empty", "exact", "near", "licence"]
    rows = [[name, facts["use"], *_cells(facts, tokens)] for name, facts in domains.items()]
    lines = [*_align([header, *rows]), ""]
    near = "" if figures["near_duplicates_dropped"] else " (not looked for: data.near_duplicates)"
    lines += [
        "Documents by split. Left out: empty ones, exact copies of others, near-duplicates of "
        f"others{near}.",
        f"A run reads up to {settings.train_documents} / {settings.validation_documents} / "
        f"{settings.test_documents} documents of each domain (data.train_documents, ...).",
        "Licences are those that --licences states; where they are unknown, find out before you "
        "publish what is trained on the text.",
    ]
    return "\n".join(lines)


def _parts(facts: dict[str, Any]) -> list[dict[str, int]]:
    return list(facts["splits"].values())


def _cells(facts: dict[str, Any], tokens: bool) -> list[str]:
    splits = facts["splits"]
    documents = [splits.get(split, {}).get("documents", 0) for split in SPLITS]
    counts = ["bytes", *(["tokens"] if tokens else []), "empty", "exact", "near"]
    sums = [sum(part[count] for part in _parts(facts)) for count in counts]
    return [*(f"{number:,}" for number in (*documents, *sums)), facts["licence"]]


def _align(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * width for width in widths]
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        yield f"| {' | '.join(cells)} |"
