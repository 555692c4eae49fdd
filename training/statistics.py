"""Paired bootstrap over documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, in nats per token."""

    estimate: float
    low: float
    high: float

    def as_json(self) -> list[float]:
        """[estimate, low, high]."""
        return [round(value, 5) for value in (self.estimate, self.low, self.high)]


class Bootstrap:
    """Resamples the documents of each domain, the same documents for every variant.

    Args:
        domains: name of each document's domain.
        tokens: scored tokens of each document.
        resamples: how many.
        seed: of the resampling.
    """

    def __init__(
        self, domains: Sequence[str], tokens: Sequence[int], resamples: int, seed: int
    ) -> None:
        self._rows = {name: np.flatnonzero(np.asarray(domains) == name) for name in domains}
        self._tokens = np.asarray(tokens, np.float64)
        random = np.random.default_rng(seed)
        self._counts = {
            name: random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), resamples)
            for name, rows in self._rows.items()
        }

    def domain(self, name: str, difference: Array) -> Interval:
        """Of the per-document sums `difference` [documents]: the mean per token of one domain."""
        return _interval(*self._domain(name, difference))

    def mean(self, difference: Array) -> Interval:
        """The unweighted mean over domains; the domains themselves are not resampled."""
        parts = [self._domain(name, difference) for name in self._rows]
        estimates, samples = zip(*parts, strict=True)
        return _interval(float(np.mean(estimates)), np.mean(samples, axis=0))

    def _domain(self, name: str, difference: Array) -> tuple[float, Array]:
        rows, counts = self._rows[name], self._counts[name]
        sums, tokens = difference[rows], self._tokens[rows]
        return float(sums.sum() / tokens.sum()), (counts @ sums) / (counts @ tokens)


def _interval(estimate: float, samples: Array) -> Interval:
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(estimate, float(low), float(high))
