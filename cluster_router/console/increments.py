"""Increments: what a router tells the board each second of the requests it serves."""

from __future__ import annotations

from dataclasses import dataclass

from cluster_router.console.counts import Numbers, ended, progress
from cluster_router.tally import ClusterTraffic, Key, Rate, StreamEnd
from cluster_router.traffic import OTHER, Traffic
from cluster_router.wire.types import TokenizedRequest

_RATE_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Increment:
    """Requests since the last time.

    Attributes:
        in_flight: streams that run now.
        rate: of all requests together, over the last seconds.
        counts: by key, what to add, [WIDTH] each; see `counts.py`.
    """

    in_flight: int
    rate: Rate
    counts: tuple[tuple[Key, Numbers], ...]


class Increments:
    """Adds up what a `Traffic` sees from one `take` to the next. For one event loop.

    Streams are counted when they end, the tokens of their answers when they come.
    """

    def __init__(self) -> None:
        self._counts: dict[Key, Numbers] = {}
        self._told: dict[Key, tuple[int, int]] = {}

    def listen(self, request: TokenizedRequest, end: StreamEnd) -> None:
        """Take the end of a stream; a listener of `Traffic`."""
        self._add(Key(end.namespace, request.assignment.cluster), ended(end))

    def take(self, traffic: Traffic) -> Increment:
        """What has come since the last call."""
        report = traffic.report(windows=(_RATE_S,))
        told = {one.key: (one.output_tokens, _failed(one)) for one in report.clusters}
        for key, (output, errors) in told.items():
            if key == OTHER:
                continue  # grows by what was merged into it, long after that was counted
            before = self._told.get(key, (0, 0))
            # Less than before where the key was forgotten meanwhile, and counts anew.
            more = progress(max(0, output - before[0]), max(0, errors - before[1]))
            if more.any():
                self._add(key, more)
        self._told = told
        counts, self._counts = self._counts, {}
        total = report.total
        return Increment(total.in_flight, total.rates[_RATE_S], tuple(counts.items()))

    def _add(self, key: Key, numbers: Numbers) -> None:
        held = self._counts.get(key)
        self._counts[key] = numbers if held is None else held + numbers


def _failed(one: ClusterTraffic) -> int:
    return sum(count for code, count in one.errors.items() if code != "cancelled")
