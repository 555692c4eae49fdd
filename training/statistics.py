"""Paired bootstrap over documents, and over domains of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, in nats per token or a share."""

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
        shape = (resamples, len(self._rows))
        self._drawn = random.integers(len(self._rows), size=shape)
        # A domain drawn twice shall not have its documents drawn alike.
        self._within = random.integers(resamples, size=shape)

    def domain(self, name: str, difference: Array) -> Interval:
        """Of the per-document sums `difference` [documents]: the mean per token of one domain."""
        return _interval(*self._domain(name, difference))

    def mean(self, difference: Array) -> Interval:
        """The unweighted mean over domains; the domains themselves are not resampled."""
        estimate, samples = self._mean(difference)
        return _interval(estimate, samples.mean(axis=1))

    def hierarchical(self, difference: Array) -> Interval:
        """The unweighted mean over domains; domains are resampled, then documents within each.

        Its interval is for other domains of the same kind, that of `mean` for other documents.
        """
        estimate, samples = self._mean(difference)
        return _interval(estimate, self._redrawn(samples))

    def share(self, part: Array, whole: Array) -> Interval:
        """The mean of `part` over the mean of `whole`, both resampled as in `hierarchical`.

        Where the resampled whole comes near zero the interval is wide, as it should be.
        """
        (some, parts), (all_, wholes) = self._mean(part), self._mean(whole)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = self._redrawn(parts) / self._redrawn(wholes)
        return _interval(some / all_, shares[np.isfinite(shares)])

    def _mean(self, difference: Array) -> tuple[float, Array]:
        """The mean, and resampled means [resamples, domains]."""
        parts = [self._domain(name, difference) for name in self._rows]
        estimates, samples = zip(*parts, strict=True)
        return float(np.mean(estimates)), np.stack(samples, axis=1)

    def _redrawn(self, samples: Array) -> Array:
        means: Array = samples[self._within, self._drawn].mean(axis=1)
        return means

    def _domain(self, name: str, difference: Array) -> tuple[float, Array]:
        rows, counts = self._rows[name], self._counts[name]
        sums, tokens = difference[rows], self._tokens[rows]
        return float(sums.sum() / tokens.sum()), (counts @ sums) / (counts @ tokens)


def _interval(estimate: float, samples: Array) -> Interval:
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(estimate, float(low), float(high))
