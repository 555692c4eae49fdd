"""Figures of an evaluation, JSON values only. All gains are positive where something is won."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data import Window
from training.evaluation.evaluator import Measured
from training.statistics import Array, Bootstrap, Interval

GAINS = {
    "over_base": ("base", "hyper"),
    "net": ("static", "hyper"),
    "conditioning": ("shuffled", "hyper"),
    "refined_over_base": ("base", "refined"),
    "refined_net": ("static", "refined"),
    "refined_conditioning": ("refined_shuffled", "refined"),
    "over_budget": ("budget_static", "hyper"),
    "refined_over_budget": ("budget_static", "refined"),
}
"""Gain: (worse, better). Positive when the second variant has the lower loss."""
SHUFFLED = {"hyper": "shuffled", "refined": "refined_shuffled"}
"""Shuffled control of the variants that are served."""
_ADAPTED = ("hyper", "stream", "refined")
SMALLEST_GAP = 0.01
"""Shares of a gap smaller than this, in nats per token, say nothing and are left out."""

Mask = NDArray[np.bool_]
_Estimate = Callable[[Bootstrap, Array], Interval]


class GroupFigures:
    """Figures of one group, or of some of its domains.

    Args:
        measured: the group.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    def __init__(self, measured: Measured, resamples: int, seed: int) -> None:
        self._windows = list(measured.windows)
        self._sums = measured.sums
        self._resamples = resamples
        self._seed = seed
        self._bootstraps: dict[bytes, Bootstrap] = {}
        everywhere = [name for name, sums in self._sums.items() if np.isfinite(sums).all()]
        self._whole = {name: self._sums[name] for name in everywhere}
        self._assigned = np.array([facts.assigned for facts in measured.facts])

    def report(self) -> dict[str, Any]:
        """By domain, their unweighted mean, shares, and what was measured on a part only."""
        domains = {name: self._domain(name) for name in self._domains(self._windows)}
        return {"domains": domains, "mean": self._mean(domains), **self._parts()}

    @staticmethod
    def _domains(windows: Sequence[Window]) -> list[str]:
        return list(dict.fromkeys(window.domain for window in windows))

    def gain(self, worse: str, better: str) -> tuple[Bootstrap, Array]:
        """Where both were measured: the bootstrap, and the per-document difference."""
        mask = np.isfinite(self._sums[worse]) & np.isfinite(self._sums[better])
        return self._bootstrap(mask), (self._sums[worse] - self._sums[better])[mask]

    def _bootstrap(self, mask: Mask) -> Bootstrap:
        key = mask.tobytes()
        if key not in self._bootstraps:
            chosen = [w for w, keep in zip(self._windows, mask, strict=True) if keep]
            self._bootstraps[key] = Bootstrap(
                [w.domain for w in chosen], [w.scored for w in chosen], self._resamples, self._seed
            )
        return self._bootstraps[key]

    def _domain(self, name: str) -> dict[str, Any]:
        chosen = [i for i, window in enumerate(self._windows) if window.domain == name]
        tokens = sum(self._windows[i].scored for i in chosen)
        text = max(1, sum(self._windows[i].scored_bytes for i in chosen))
        totals = {v: float(sums[chosen].sum()) for v, sums in self._whole.items()}
        return {
            "documents": len(chosen),
            "tokens": tokens,
            "unassigned": round(float((~self._assigned[chosen]).mean()), 4),
            "nats_per_token": {v: round(x / tokens, 5) for v, x in totals.items()},
            "bits_per_byte": {v: round(x / math.log(2) / text, 5) for v, x in totals.items()},
            "gains": self._gains(lambda bootstrap, sums: bootstrap.domain(name, sums)),
            "over_static": self._over_static(lambda bootstrap, sums: bootstrap.domain(name, sums)),
        }

    def _mean(self, domains: dict[str, dict[str, Any]]) -> dict[str, Any]:
        def average(unit: str) -> dict[str, float]:
            return {
                v: round(float(np.mean([figures[unit][v] for figures in domains.values()])), 5)
                for v in self._whole
            }

        return {
            "documents": len(self._windows),
            "tokens": sum(window.scored for window in self._windows),
            "nats_per_token": average("nats_per_token"),
            "bits_per_byte": average("bits_per_byte"),
            "gains": self._gains(Bootstrap.hierarchical),
            "gains_same_domains": self._gains(Bootstrap.mean),
            "over_static": self._over_static(Bootstrap.hierarchical),
        }

    def _gains(self, interval: _Estimate) -> dict[str, list[float]]:
        return {
            gain: interval(*self.gain(worse, better)).as_json()
            for gain, (worse, better) in GAINS.items()
            if worse in self._whole and better in self._whole
        }

    def _over_static(self, interval: _Estimate) -> dict[str, list[float]]:
        return {
            name: interval(*self.gain("static", name)).as_json()
            for name in self._sums
            if name != "static"
        }

    def _parts(self) -> dict[str, Any]:
        """Shares of gains, and the losses where the expensive variants were measured."""
        found: dict[str, Any] = {"shares": self._shares()}
        partial = [name for name in self._sums if name not in self._whole]
        if partial:
            mask = np.all([np.isfinite(self._sums[name]) for name in partial], axis=0)
            bootstrap = self._bootstrap(mask)
            found["part"] = {
                "documents": int(mask.sum()),
                "nats_per_token": {
                    name: round(bootstrap.mean(sums[mask]).estimate, 5)
                    for name, sums in self._sums.items()
                },
            }
        return found

    def _shares(self) -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = {
            "lost_when_shuffled": {},
            "oracle_gap_closed": {},
            "in_context_recovered": {},
        }
        for name, control in SHUFFLED.items():
            self._share(found["lost_when_shuffled"], name, (control, name), (name, 1e-4))
        for name in _ADAPTED:
            self._share(found["oracle_gap_closed"], name, ("static", name), ("oracle", None))
            self._share(found["in_context_recovered"], name, ("static", name), ("in_context", None))
        return {share: values for share, values in found.items() if values}

    def _share(
        self,
        found: dict[str, list[float]],
        name: str,
        part: tuple[str, str],
        whole: tuple[str, float | None],
    ) -> None:
        """Of the gain over static of `whole`, the share that is the gain of `part`."""
        target, least = whole
        if not {*part, target} <= set(self._sums):
            return
        mask = np.all([np.isfinite(self._sums[v]) for v in (*part, target)], axis=0)
        bootstrap = self._bootstrap(mask)
        all_ = (self._sums["static"] - self._sums[target])[mask]
        if bootstrap.mean(all_).estimate < (SMALLEST_GAP if least is None else least):
            return
        some = (self._sums[part[0]] - self._sums[part[1]])[mask]
        found[name] = bootstrap.share(some, all_).as_json()
