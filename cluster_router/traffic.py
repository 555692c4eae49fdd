"""Traffic: what one router serves, by namespace and cluster, and never what was said.

Counts since the start, rates over recent windows, and samples of the latest requests for quantiles
and spreads. All of it is bounded, whatever clients send.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster_router.openai.errors import error_code
from cluster_router.tally import WINDOW_S, ClusterTraffic, Key, StreamEnd, Tally
from cluster_router.wire.types import Adaptation, AdapterKey, TokenChunk, TokenizedRequest

OTHER = Key("", -1)
"""Of keys that had to make room for newer ones."""

CUT_OFF = "cut_off"
"""Code of a stream that ended without an end and without an error."""

Listener = Callable[[TokenizedRequest, StreamEnd], None]


@dataclass(frozen=True, slots=True)
class TrafficReport:
    """What a router has served by one moment.

    Attributes:
        uptime_s: since the router started.
        total: all keys together.
        clusters: by key, least recently seen first; `OTHER` before all, if there is one.
    """

    uptime_s: float
    total: ClusterTraffic
    clusters: tuple[ClusterTraffic, ...]


class Traffic:
    """Sees every stream of a router. For one event loop.

    Args:
        max_keys: namespaces and clusters kept apart; the least recently seen are merged into
            `OTHER`. At least 2.
        clock: seconds, monotonic.
        listeners: told of each stream's end. They must return at once and never fail.
    """

    def __init__(
        self,
        max_keys: int = 512,
        clock: Callable[[], float] = time.monotonic,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self.clock = clock
        self.listeners = listeners
        self._max_keys = max_keys
        self._started = clock()
        self._total = Tally()
        self._tallies: OrderedDict[Key, Tally] = OrderedDict()

    def begin(self, request: TokenizedRequest) -> Flight:
        """Watch the stream that answers `request`; it counts from now on."""
        own = self._tally(Key(request.namespace, request.assignment.cluster))
        return Flight(self, request, (own, self._total))

    def refused(self, namespace: str, error: BaseException) -> None:
        """Count a request that was refused before there was a stream."""
        now, code = self.clock(), error_code(error)
        for tally in (self._tally(Key(namespace, None)), self._total):
            tally.fail(now, code)

    def gained(self, namespace: str, cluster: int, nats: float) -> None:
        """Take an estimate of what a cluster's update gains, in nats per token."""
        for tally in (self._tally(Key(namespace, cluster)), self._total):
            tally.gain(nats)

    def report(self, windows: Iterable[float] = (10.0, 60.0, WINDOW_S)) -> TrafficReport:
        """Everything at this moment, with rates over `windows` (seconds, up to `WINDOW_S`)."""
        now, windows = self.clock(), tuple(windows)
        uptime = now - self._started
        tallies = sorted(self._tallies.items(), key=lambda item: item[0] != OTHER)
        return TrafficReport(
            uptime_s=uptime,
            total=self._total.report(Key("", None), now, uptime, windows),
            clusters=tuple(tally.report(key, now, uptime, windows) for key, tally in tallies),
        )

    def _tally(self, key: Key) -> Tally:
        tally = self._tallies.get(key)
        if tally is not None:
            self._tallies.move_to_end(key)
            return tally
        while len(self._tallies) >= self._max_keys:
            idle = (key for key, one in self._tallies.items() if not one.in_flight and key != OTHER)
            oldest = next(idle, None)
            if oldest is None:  # streams hold on to every tally
                key = OTHER
                break
            merged = self._tallies.pop(oldest)
            self._tallies.setdefault(OTHER, Tally()).merge(merged)
        return self._tallies.setdefault(key, Tally())


class Flight:
    """One stream on its way. `end` is to be called once, whatever ends it."""

    __slots__ = (
        "_begun",
        "_cached",
        "_finish",
        "_first",
        "_last",
        "_longest",
        "_request",
        "_stand_in",
        "_tallies",
        "_tokens",
        "_traffic",
    )

    def __init__(
        self, traffic: Traffic, request: TokenizedRequest, tallies: tuple[Tally, ...]
    ) -> None:
        self._traffic, self._request, self._tallies = traffic, request, tallies
        self._begun = self._last = traffic.clock()
        self._first: float | None = None
        self._longest = 0.0
        self._tokens = self._cached = 0
        self._finish: str | None = None
        self._stand_in: AdapterKey | None = None
        for tally in tallies:
            tally.begin(self._begun, len(request.prompt_tokens))

    def chunk(self, chunk: TokenChunk) -> None:
        """Count one chunk. On the path of every token, so it does little."""
        count = len(chunk.tokens)
        if count:
            now = self._traffic.clock()
            came = now if chunk.received_s is None else chunk.received_s
            if self._first is None:
                self._first = came
            elif came - self._last > self._longest:
                self._longest = came - self._last
            self._last = came
            self._tokens += count
            for tally in self._tallies:
                tally.output(now, count)
        if chunk.cached_tokens:
            self._cached = chunk.cached_tokens
        if chunk.stand_in is not None:
            self._stand_in = chunk.stand_in
        if chunk.finish_reason is not None:
            self._finish = chunk.finish_reason

    def end(self, error: BaseException | None = None) -> None:
        """Count how it ended: `error` is what was raised, None where nothing was."""
        now = self._traffic.clock()
        end = self._summary(now, error)
        for tally in self._tallies:
            tally.end(now, end)
        for listener in self._traffic.listeners:
            listener(self._request, end)

    def _summary(self, now: float, error: BaseException | None) -> StreamEnd:
        request, begun, first, last = self._request, self._begun, self._first, self._last
        gap = None if first is None or last == first else (last - first) / (self._tokens - 1)
        code = None
        if self._finish is None:  # a reader that leaves after the last chunk has left nothing out
            code = CUT_OFF if error is None else error_code(error)
        return StreamEnd(
            request_id=request.request_id,
            namespace=request.namespace,
            adaptation=Adaptation.of(request.assignment, self._stand_in),
            prompt_tokens=len(request.prompt_tokens),
            cached_tokens=self._cached,
            output_tokens=self._tokens,
            first_token_s=None if first is None else first - begun,
            token_gap_s=gap,
            longest_gap_s=None if gap is None else self._longest,
            seconds=now - begun,
            finish_reason=self._finish,
            error=code,
        )
