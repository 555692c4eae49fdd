"""How the gain goes with support, with similarity, and with what refinement promised."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.evaluation.evaluator import Measured
from training.evaluation.figures import GroupFigures, Mask
from training.evaluation.stream_variants import AT
from training.statistics import Array, Bootstrap

_SUPPORTS = (0, 1, 8, 16, 32, 64, 128)
"""Lower ends of the ranges of earlier contexts."""
_THRESHOLDS = 12
_BINS = 6


def curves(measured: Measured, figures: GroupFigures, seed: int) -> dict[str, Any]:
    """Curves of one group, JSON values only; those that were not measured are left out."""
    found = {
        "support": _by_size(measured, figures),
        "arrived": _by_arrivals(measured, seed),
        "threshold": _by_threshold(measured),
        "reliability": _by_promise(measured, seed),
        "distribution": _distribution(measured),
    }
    return {name: curve for name, curve in found.items() if curve}


def _per_token(measured: Measured, name: str) -> Array:
    """Gain over static of each document, nats per token; NaN where it is not measured."""
    tokens = np.array([window.scored for window in measured.windows])
    gains: Array = (measured.sums["static"] - measured.sums[name]) / tokens
    return gains


def _by_size(measured: Measured, figures: GroupFigures) -> list[dict[str, Any]]:
    """The same documents under refinements that had seen at most so many contexts."""
    points = []
    for name in measured.sums:
        if name.startswith(AT):
            bootstrap, sums = figures.gain("static", name)
            gain = bootstrap.hierarchical(sums).as_json()
            points.append({"at_most": int(name.removeprefix(AT)), "gain": gain})
    return points


def _by_arrivals(measured: Measured, seed: int) -> list[dict[str, Any]]:
    """Documents by how many contexts of their cluster had arrived."""
    if "refined" not in measured.sums:
        return []
    support = np.array([facts.support or 0 for facts in measured.facts])
    points = []
    for low, high in zip(_SUPPORTS, (*_SUPPORTS[1:], np.inf), strict=True):
        if point := _pooled(measured, "refined", (support >= low) & (support < high), seed):
            points.append({"from": low, "to": None if high == np.inf else int(high) - 1, **point})
    return points


def _by_threshold(measured: Measured) -> list[dict[str, Any]]:
    """The gain of `hyper` if documents less similar than this stayed with the static update."""
    if "nearest" not in measured.sums:
        return []
    gains = _per_token(measured, "nearest")
    similarities = np.array([facts.similarity for facts in measured.facts])
    places = np.unique(np.quantile(similarities, np.linspace(0, 1, _THRESHOLDS)))
    return [
        {
            "threshold": round(float(place), 5),
            "adapted": round(float((similarities >= place).mean()), 4),
            "gain": round(float(np.where(similarities >= place, gains, 0).mean()), 5),
        }
        for place in places
    ]


def _by_promise(measured: Measured, seed: int) -> list[dict[str, Any]]:
    """Documents by what refinement had gained on the contexts it held back."""
    promised = np.array(
        [np.nan if facts.predicted is None else facts.predicted for facts in measured.facts]
    )
    known = np.flatnonzero(np.isfinite(promised))
    if "refined" not in measured.sums or len(known) < 2:
        return []
    order = known[np.argsort(promised[known], kind="stable")]
    points = []
    for part in np.array_split(order, min(_BINS, len(order) // 2)):
        mask = np.zeros(len(promised), bool)
        mask[part] = True
        if point := _pooled(measured, "refined", mask, seed):
            points.append({"promised": round(float(promised[part].mean()), 5), **point})
    return points


def _distribution(measured: Measured) -> dict[str, Any]:
    """Gain of each document over static, sorted, and the share that gained."""
    found: dict[str, Any] = {}
    for name in ("hyper", "refined"):
        if name in measured.sums:
            gains = np.sort(_per_token(measured, name))
            found[name] = {
                "gained": round(float((gains > 0).mean()), 4),
                "gains": [round(float(gain), 4) for gain in gains],
            }
    return found


def _pooled(measured: Measured, name: str, mask: Mask, seed: int) -> dict[str, Any] | None:
    """Gain of the documents of a mask, whatever their domain; None for fewer than two."""
    chosen: NDArray[np.int64] = np.flatnonzero(mask & np.isfinite(measured.sums[name]))
    if len(chosen) < 2:
        return None
    tokens = [measured.windows[i].scored for i in chosen]
    bootstrap = Bootstrap(["all"] * len(chosen), tokens, 2000, seed)
    difference = (measured.sums["static"] - measured.sums[name])[chosen]
    gain = bootstrap.domain("all", difference).as_json()
    return {"documents": len(chosen), "gain": gain}
