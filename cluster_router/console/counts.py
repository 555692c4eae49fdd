"""Counts: what some requests came to, as one vector, so that any number of them add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster_router.tally import StreamEnd

Numbers = NDArray[np.float64]

SECONDS = np.geomspace(0.002, 240.0, 34)
"""Upper bounds of the bins in which times to the first token are counted."""

COSINES = np.linspace(0.5, 1.0, 51)[1:]
"""Upper bounds of the bins in which similarities are counted; the first takes all lower ones."""

MODES = ("cluster", "static", "off")

_PROMPT, _CACHED, _OUTPUT, _ERRORS = range(len(MODES), len(MODES) + 4)
_FIRST = slice(_ERRORS + 1, _ERRORS + 1 + len(SECONDS))
_SIMILARITY = slice(_FIRST.stop, _FIRST.stop + len(COSINES))
WIDTH = _SIMILARITY.stop


@dataclass(frozen=True, slots=True, eq=False)
class Counts:
    """Sums over some requests.

    Attributes:
        numbers: float64 [WIDTH].
    """

    numbers: Numbers

    @classmethod
    def of(cls, parts: Iterable[Numbers]) -> Counts:
        """The sum of vectors [WIDTH]; of none, nothing."""
        total = np.zeros(WIDTH)
        for part in parts:
            total += part
        return cls(total)

    @property
    def requests(self) -> float:
        """Streams that ended."""
        return float(self.numbers[: len(MODES)].sum())

    @property
    def modes(self) -> dict[str, float]:
        """Streams that ended, by what their answers ran under."""
        return dict(zip(MODES, self.numbers.tolist(), strict=False))

    @property
    def prompt_tokens(self) -> float:
        """Tokens of their prompts."""
        return float(self.numbers[_PROMPT])

    @property
    def cached_tokens(self) -> float:
        """Those of them that a prefix cache held."""
        return float(self.numbers[_CACHED])

    @property
    def output_tokens(self) -> float:
        """Tokens of answers, as they stream."""
        return float(self.numbers[_OUTPUT])

    @property
    def errors(self) -> float:
        """Requests that failed or were refused; not those that their callers left."""
        return float(self.numbers[_ERRORS])

    @property
    def similarities(self) -> Numbers:
        """How many prompts fell into each bin of COSINES."""
        return self.numbers[_SIMILARITY]

    def first_token_s(self, share: float) -> float | None:
        """Seconds within which `share` of the requests had their first token, to a bin of 42 %."""
        return _quantile(self.numbers[_FIRST], SECONDS, 0.0, share)

    def similarity(self, share: float) -> float | None:
        """The cosine that `share` of the prompts do not exceed, within 0.01."""
        return _quantile(self.similarities, COSINES, 2 * COSINES[0] - COSINES[1], share)


def ended(stream: StreamEnd) -> Numbers:
    """What a stream adds at its end, [WIDTH]. Its answer's tokens were added as they came."""
    numbers = np.zeros(WIDTH)
    numbers[MODES.index(stream.adaptation.mode)] = 1
    numbers[_PROMPT], numbers[_CACHED] = stream.prompt_tokens, stream.cached_tokens
    if stream.first_token_s is not None:
        numbers[_FIRST][_bin(SECONDS, stream.first_token_s)] = 1
    if stream.adaptation.similarity is not None:
        numbers[_SIMILARITY][_bin(COSINES, stream.adaptation.similarity)] = 1
    return numbers


def progress(output_tokens: int, errors: int) -> Numbers:
    """What is counted as it happens, [WIDTH]."""
    numbers = np.zeros(WIDTH)
    numbers[_OUTPUT], numbers[_ERRORS] = output_tokens, errors
    return numbers


def _bin(bounds: Numbers, value: float) -> int:
    return min(int(np.searchsorted(bounds, value)), len(bounds) - 1)


def _quantile(counts: Numbers, bounds: Numbers, lowest: float, share: float) -> float | None:
    """Interpolated within the bin, as Prometheus does."""
    reached = np.cumsum(counts)
    if not reached[-1]:
        return None
    found = int(np.searchsorted(reached, share * reached[-1]))
    below = reached[found - 1] if found else 0.0
    low = bounds[found - 1] if found else lowest
    return float(low + (bounds[found] - low) * (share * reached[-1] - below) / counts[found])
