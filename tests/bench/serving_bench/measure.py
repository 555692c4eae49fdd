"""From the arrival times of tokens to the figures of the report. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from serving_bench.workload import Trace


@dataclass(frozen=True)
class Percentiles:
    """Median and tails."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class RunFigures:
    """One workload on one engine.

    Attributes:
        tokens_per_s: output tokens over the time from the first request to the last token.
        first_ms: from a request's sending to its first token.
        queued_first_s: from the start of the workload to the first token, as a caller sees it who
            sends all requests at once.
        between_ms: between arrivals of one request's tokens.
        output_tokens: tokens that came back.
    """

    tokens_per_s: float
    first_ms: Percentiles
    queued_first_s: Percentiles
    between_ms: Percentiles
    output_tokens: int


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def percentiles(values: Sequence[float]) -> Percentiles:
    """Of values that may be none (then all are zero)."""
    if not values:
        return Percentiles(0.0, 0.0, 0.0)
    return Percentiles(*(percentile(values, share) for share in (0.5, 0.95, 0.99)))


def run_figures(traces: Sequence[Trace]) -> RunFigures:
    """Figures of one run.

    Raises:
        ValueError: a request has no output.
    """
    if any(not trace.times for trace in traces):
        raise ValueError("a request came back without output")
    tokens = sum(trace.count for trace in traces)
    gaps = [1000 * (b - a) for trace in traces for a, b in pairwise(trace.times)]
    return RunFigures(
        tokens_per_s=tokens / max(trace.times[-1] for trace in traces),
        first_ms=percentiles([1000 * (trace.times[0] - trace.sent) for trace in traces]),
        queued_first_s=percentiles([trace.times[0] for trace in traces]),
        between_ms=percentiles(gaps),
        output_tokens=tokens,
    )


@dataclass(frozen=True)
class Spread:
    """Median of several runs, and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


def paired_ratio(ours: dict[int, float], reference: dict[int, float]) -> Spread | None:
    """How many times the reference, repeat by repeat; None without a common repeat.

    Neighbours in time share what else the machine was doing, so their ratio is steadier than the
    ratio of medians.
    """
    common = sorted(ours.keys() & reference.keys())
    return Spread.of(ours[r] / reference[r] for r in common) if common else None


def agreement(ours: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> float | None:
    """Mean share of an answer up to its first token that differs from the reference's.

    None where one of the two does not tell its tokens.
    """
    pairs = [(a, b) for a, b in zip(ours, reference, strict=True) if a and b]
    if not pairs:
        return None
    return statistics.fmean(_common_prefix(a, b) / max(len(a), len(b)) for a, b in pairs)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for place, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return place
    return min(len(a), len(b))
