"""Throughput against clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(summary: list[dict[str, Any]], path: Path) -> bool:
    """One panel for each concurrency; False where matplotlib is not installed.

    Adapted engines are lines over the number of clusters with bars from minimum to maximum,
    unadapted ones dashed levels.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(row["concurrency"] for row in summary))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6 * len(panels), 4), layout="constrained", squeeze=False
    )
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["engine"] for r in summary))}
    for panel, concurrency in zip(axes[0], panels, strict=True):
        rows = [row for row in summary if row["concurrency"] == concurrency]
        _draw(panel, rows, colours)
        panel.set(title=f"{concurrency} at a time", xlabel="clusters", ylabel="output tokens/s")
        if clusters := sorted({row["clusters"] for row in rows if row["adapted"]}):
            panel.set_xscale("log")
            panel.set_xticks(clusters, [str(count) for count in clusters])
            panel.minorticks_off()
            panel.set_xlim(clusters[0] / 2, clusters[-1] * 2)  # one number alone has no range
        panel.set_ylim(bottom=0)
        panel.legend()
    figure.savefig(path, dpi=120)
    return True


def _draw(panel: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    for engine, colour in colours.items():
        mine = [row for row in rows if row["engine"] == engine]
        for row in mine:
            if not row["adapted"]:
                level = row["tokens_per_s"]["median"]
                panel.axhline(level, color=colour, linestyle="--", label=f"{engine}, off")
        adapted = sorted((row for row in mine if row["adapted"]), key=lambda row: row["clusters"])
        if adapted:
            speeds = [row["tokens_per_s"] for row in adapted]
            middle = [speed["median"] for speed in speeds]
            bars = [
                [speed["median"] - speed["low"] for speed in speeds],
                [speed["high"] - speed["median"] for speed in speeds],
            ]
            clusters = [row["clusters"] for row in adapted]
            panel.errorbar(
                clusters, middle, bars, color=colour, marker="o", label=engine, capsize=3
            )
