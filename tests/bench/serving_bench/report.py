"""From runs to summaries, ratios and tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from serving_bench.measure import Spread, agreement, paired_ratio
from serving_bench.schedule import Run

FIGURES = {
    "tokens_per_s": "tokens_per_s",
    **{
        f"{name}_{share}": f"{name}.{share}"
        for name in ("first_ms", "queued_first_s", "between_ms")
        for share in ("p50", "p95", "p99")
    },
}
"""Name of each summarised figure, and where it is in RunFigures."""

RowKey = tuple[int, str]
"""Concurrency and the variant's row name."""


def grouped(runs: Sequence[Run]) -> dict[RowKey, list[Run]]:
    """Repeats of the same row together, in the order of their first runs."""
    rows: dict[RowKey, list[Run]] = defaultdict(list)
    for run in runs:
        rows[run.cell.concurrency, run.cell.variant.row(run.cell.clusters)].append(run)
    return dict(rows)


def summarise(runs: Sequence[Run], reference: str) -> list[dict[str, Any]]:
    """A summary for each row: median and spread of every figure, and what the reference has to it.

    The reference is a row's name; where a concurrency lacks it, ratios are None.
    """
    rows = grouped(runs)
    return [_summary(key, found, rows.get((key[0], reference), [])) for key, found in rows.items()]


def _summary(key: RowKey, runs: list[Run], reference: list[Run]) -> dict[str, Any]:
    cell = runs[0].cell
    figures = {
        name: asdict(Spread.of(attrgetter(path)(run.figures) for run in runs))
        for name, path in FIGURES.items()
    }
    ratio = paired_ratio(_speeds(runs), _speeds(reference))
    return {
        "concurrency": key[0],
        "row": key[1],
        "engine": cell.variant.engine,
        "adapted": cell.variant.adapted,
        "clusters": cell.clusters,
        "runs": len(runs),
        **figures,
        "peak_mb": max(run.peak_mb for run in runs),
        "times_reference": None if ratio is None else asdict(ratio),
        "same_answers": _same_answers(runs, reference),
    }


def _speeds(runs: Sequence[Run]) -> dict[int, float]:
    return {run.cell.repeat: run.figures.tokens_per_s for run in runs}


def _same_answers(runs: list[Run], reference: list[Run]) -> float | None:
    """Agreement with the reference's answers; None where they run under different weights."""
    if not reference or runs[0].cell.variant.adapted or reference[0].cell.variant.adapted:
        return None
    return agreement(runs[0].tokens, reference[0].tokens)


def choose_reference(runs: Sequence[Run], wanted: str | None) -> str:
    """The row others are compared with: the one named, else the first that ran."""
    names = [run.cell.variant.row(run.cell.clusters) for run in runs]
    return wanted if wanted in names or not names else names[0]  # type: ignore[return-value]


HEADER = (
    "| engine | tokens/s (min-max) | x reference (min-max) | first token ms p50 / p95 "
    "| first token s, all sent at once, p50 | between tokens ms p50 / p95 / p99 "
    "| peak MB | same answers |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    lines = ["# Serving bench\n", *_facts(report)]
    for concurrency in dict.fromkeys(row["concurrency"] for row in report["summary"]):
        rows = [row for row in report["summary"] if row["concurrency"] == concurrency]
        lines += [f"\n## {concurrency} at a time, reference: {report['reference']}\n", HEADER]
        lines += [_row(row, report["started"]) for row in rows]
    if report["left_out"]:
        lines += ["\nLeft out:\n"]
        lines += [f"- {name}: {reason}" for name, reason in report["left_out"].items()]
    return "\n".join(lines) + "\n"


def _facts(report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    shown = ("cpu", "threads", "memory_gb", "device_name", "copy_gb_per_s", "load_average")
    started = [
        f"{name}: {facts['version']}, ready after {facts['start_s']} s"
        for name, facts in report["started"].items()
    ]
    return [
        "- machine: " + ", ".join(f"{k} {machine[k]}" for k in shown if k in machine),
        f"- model: {report['model']}; prompts from: {report['text']}",
        f"- command: `{report['command']}`",
        *(f"- {one}" for one in started),
    ]


def _row(row: dict[str, Any], started: dict[str, Any]) -> str:
    speed, ratio = row["tokens_per_s"], row["times_reference"]
    same = row["same_answers"]
    loaded = started[f"{row['engine']} {'on' if row['adapted'] else 'off'}"]["ready_mb"]
    cells = [
        row["row"],
        f"{speed['median']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})",
        "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        f"{row['first_ms_p50']['median']:.0f} / {row['first_ms_p95']['median']:.0f}",
        f"{row['queued_first_s_p50']['median']:.1f}",
        " / ".join(f"{row[f'between_ms_{p}']['median']:.0f}" for p in ("p50", "p95", "p99")),
        f"{max(row['peak_mb'], loaded):.0f}",
        "-" if same is None else f"{same:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"
