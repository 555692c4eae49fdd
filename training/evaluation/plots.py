"""Plots of an evaluation. matplotlib is needed for these alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from training.data.optional import load

_SHOWN = ("base", "static", "budget_static", "hyper", "refined")


def draw(figures: dict[str, Any], folder: Path) -> list[str]:
    """Write PNG files into `folder`; returns their names. What was not measured is not drawn.

    Raises:
        SetupError: matplotlib is not installed.
    """
    matplotlib = load("matplotlib", "matplotlib", "drawing the plots of an evaluation")
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for group in ("seen", "unseen", "wikitext"):
        if group not in figures:
            continue
        curves = figures[group].get("curves", {})
        names += _figure(folder, f"{group}-domains", _domains, figures[group])
        for curve, plot in _CURVES.items():
            if curves.get(curve):
                names += _figure(folder, f"{group}-{curve}", plot, curves[curve])
    return names


def _figure(folder: Path, name: str, plot: Callable[[Any, Any], None], data: Any) -> list[str]:
    pyplot = load("matplotlib.pyplot", "matplotlib", "drawing the plots of an evaluation")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    plot(axes, data)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(folder / f"{name}.png", dpi=110)
    pyplot.close(figure)
    return [f"{name}.png"]


def _domains(axes: Any, report: dict[str, Any]) -> None:
    domains = report["domains"]
    shown = [v for v in _SHOWN if v in report["mean"]["nats_per_token"]]
    places = np.arange(len(domains))
    # Points rather than bars: the differences are small beside the losses.
    for name in shown:
        values = [figures["nats_per_token"][name] for figures in domains.values()]
        axes.plot(values, places, "o", alpha=0.7, label=name)
    axes.margins(y=0.5 / len(domains))
    axes.set_yticks(places, list(domains))
    axes.invert_yaxis()
    axes.set_xlabel("loss, nats per token")
    axes.set_title("Loss by domain")


def _support(axes: Any, curve: list[dict[str, Any]]) -> None:
    _with_interval(axes, [point["at_most"] for point in curve], curve)
    axes.set_xscale("symlog", linthresh=8)
    axes.set_xlabel("refined on at most this many earlier contexts of the cluster")
    axes.set_title("Gain against support size, the same documents throughout")


def _arrived(axes: Any, curve: list[dict[str, Any]]) -> None:
    labels = [f"{p['from']}+" if p["to"] is None else f"{p['from']}-{p['to']}" for p in curve]
    _with_interval(axes, list(range(len(curve))), curve)
    axes.set_xticks(range(len(curve)), labels)
    axes.set_xlabel("earlier contexts of the document's cluster when it arrived")
    axes.set_title("Gain against earlier arrivals")


def _threshold(axes: Any, curve: list[dict[str, Any]]) -> None:
    places = [point["threshold"] for point in curve]
    axes.plot(places, [point["gain"] for point in curve], "o-", label="gain over static")
    axes.set_xlabel("similarity below which a document keeps the static update")
    axes.set_ylabel("gain over static, nats per token")
    other = axes.twinx()
    other.plot(places, [point["adapted"] for point in curve], "--", color="grey")
    other.set_ylabel("share of documents adapted (dashed)")
    other.set_ylim(0, 1.05)
    axes.set_title("Gain against similarity threshold")


def _reliability(axes: Any, curve: list[dict[str, Any]]) -> None:
    places = [point["promised"] for point in curve]
    _with_interval(axes, places, curve)
    axes.axline((0, 0), slope=1, color="grey", linestyle=":", label="as promised")
    axes.set_xlabel("gain of the refinements on the contexts they held back, nats per token")
    axes.set_title("Reliability of the gain: what refinement promised, what documents got")


def _distribution(axes: Any, curve: dict[str, Any]) -> None:
    for name, found in curve.items():
        gains = found["gains"]
        share = 1 - np.arange(len(gains)) / len(gains)
        axes.step(gains, share, where="pre", label=f"{name}: {found['gained']:.0%} gain")
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_xlabel("gain over static of a document, nats per token")
    axes.set_ylabel("share of documents that gain at least this")
    axes.set_title("Reliability of the gain by document")


def _with_interval(axes: Any, places: list[float], curve: list[dict[str, Any]]) -> None:
    estimates, low, high = np.array([point["gain"] for point in curve]).T
    # An estimate from few documents can lie on the border of its interval.
    errors = np.maximum([estimates - low, high - estimates], 0)
    axes.errorbar(places, estimates, errors, marker="o", capsize=3, label="gain over static, 95 %")
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_ylabel("gain over static, nats per token")


_CURVES: dict[str, Callable[[Any, Any], None]] = {
    "support": _support,
    "arrived": _arrived,
    "threshold": _threshold,
    "reliability": _reliability,
    "distribution": _distribution,
}
