"""Tally: counts, recent rates and samples of one key's traffic."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, NamedTuple

from cluster_router.wire.types import Adaptation

Mode = Literal["cluster", "static", "off"]

RECENT = 128
"""Latest values kept of each sample."""
WINDOW_S = 300.0
"""Longest window that rates can be asked for."""

_BUCKET_S = 5.0


class Key(NamedTuple):
    """Whose traffic. `cluster` None: requests that no cluster was chosen for."""

    namespace: str
    cluster: int | None


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """One stream after it has ended, in whatever way.

    Attributes:
        request_id, namespace: of the request.
        adaptation: what the answer ran under.
        prompt_tokens, cached_tokens, output_tokens: counts; of an unfinished answer, so far.
        first_token_s: from the call until the router had the first token, also of an answer that
            it held back until it was whole; None if there was none.
        token_gap_s: mean time between tokens after the first; None with fewer than two.
        longest_gap_s: longest time between two tokens; None likewise.
        seconds: from the call to the end.
        finish_reason: None if it did not come to its end.
        error: code of what ended it instead; `cancelled` if the caller left, else as in answers.
    """

    request_id: str
    namespace: str
    adaptation: Adaptation
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token_s: float | None
    token_gap_s: float | None
    longest_gap_s: float | None
    seconds: float
    finish_reason: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Rate:
    """Per second, over a recent window."""

    requests: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    errors: float = 0.0


@dataclass(frozen=True, slots=True)
class ClusterTraffic:
    """Traffic of one key at one moment.

    Attributes:
        key: whose.
        in_flight: streams that run now.
        requests: streams that ended, by what their answers ran under.
        fallbacks: of these, how many ran under a stand-in.
        prompt_tokens, cached_tokens, output_tokens: counts; output as it streams.
        errors: streams that failed, and requests refused before there was one, by code.
        rates: by window in seconds.
        first_token_s, seconds: of the latest streams, oldest first.
        similarity: to the nearest centroid, of the latest streams that were compared.
        gain: nats per token by which the cluster's update beat the static one, latest estimates.
        gains: how many estimates there were.
    """

    key: Key
    in_flight: int
    requests: dict[Mode, int]
    fallbacks: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    errors: dict[str, int]
    rates: dict[float, Rate]
    first_token_s: tuple[float, ...]
    seconds: tuple[float, ...]
    similarity: tuple[float, ...]
    gain: tuple[float, ...]
    gains: int


class Tally:
    """What is counted of one key. It is written to in place; `report` copies."""

    __slots__ = (
        "_buckets",
        "_first_token_s",
        "_gain",
        "_seconds",
        "_similarity",
        "cached_tokens",
        "errors",
        "fallbacks",
        "gains",
        "in_flight",
        "output_tokens",
        "prompt_tokens",
        "requests",
    )

    def __init__(self) -> None:
        self.in_flight = self.fallbacks = self.gains = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self.requests: Counter[Mode] = Counter()
        self.errors: Counter[str] = Counter()
        self._buckets: deque[_Bucket] = deque(maxlen=int(WINDOW_S / _BUCKET_S) + 1)
        self._first_token_s, self._seconds = _sample(), _sample()
        self._similarity, self._gain = _sample(), _sample()

    def begin(self, now: float, prompt_tokens: int) -> None:
        """A stream begins."""
        self.in_flight += 1
        self.prompt_tokens += prompt_tokens
        bucket = self._bucket(now)
        bucket.requests += 1
        bucket.prompt_tokens += prompt_tokens

    def output(self, now: float, tokens: int) -> None:
        """Tokens stream out."""
        self.output_tokens += tokens
        self._bucket(now).output_tokens += tokens

    def end(self, now: float, end: StreamEnd) -> None:
        """A stream has ended."""
        self.in_flight -= 1
        self.requests[end.adaptation.mode] += 1
        self.fallbacks += end.adaptation.fallback
        self.cached_tokens += end.cached_tokens
        self._seconds.append(end.seconds)
        if end.first_token_s is not None:
            self._first_token_s.append(end.first_token_s)
        if end.adaptation.similarity is not None:
            self._similarity.append(end.adaptation.similarity)
        if end.error is not None:
            self.fail(now, end.error)

    def fail(self, now: float, code: str) -> None:
        """A request has failed, or was refused."""
        self.errors[code] += 1
        self._bucket(now).errors += 1

    def gain(self, nats: float) -> None:
        """An estimate of what the cluster's update gains."""
        self._gain.append(nats)
        self.gains += 1

    def merge(self, other: Tally) -> None:
        """Add what `other` counted, which is not used any more."""
        for name in (
            "in_flight",
            "fallbacks",
            "gains",
            "prompt_tokens",
            "cached_tokens",
            "output_tokens",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.requests.update(other.requests)
        self.errors.update(other.errors)
        for name in ("_first_token_s", "_seconds", "_similarity", "_gain"):
            getattr(self, name).extend(getattr(other, name))
        both = sorted([*self._buckets, *other._buckets], key=lambda bucket: bucket.number)
        self._buckets.clear()
        for bucket in both:
            self._at(bucket.number).add(bucket)

    def report(
        self, key: Key, now: float, uptime_s: float, windows: Iterable[float]
    ) -> ClusterTraffic:
        """All of it, as of `now`."""
        return ClusterTraffic(
            key=key,
            in_flight=self.in_flight,
            requests=dict(self.requests),
            fallbacks=self.fallbacks,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            errors=dict(self.errors),
            rates={window: self._rate(now, uptime_s, window) for window in windows},
            first_token_s=tuple(self._first_token_s),
            seconds=tuple(self._seconds),
            similarity=tuple(self._similarity),
            gain=tuple(self._gain),
            gains=self.gains,
        )

    def _rate(self, now: float, uptime_s: float, window: float) -> Rate:
        """Over the whole buckets that make up `window`, and the one that is being filled."""
        oldest = int(now / _BUCKET_S) - max(1, round(window / _BUCKET_S))
        total = _Bucket(oldest)
        for bucket in takewhile(lambda one: one.number >= oldest, reversed(self._buckets)):
            total.add(bucket)
        seconds = max(1.0, min(now - oldest * _BUCKET_S, uptime_s))
        return Rate(
            total.requests / seconds,
            total.prompt_tokens / seconds,
            total.output_tokens / seconds,
            total.errors / seconds,
        )

    def _bucket(self, now: float) -> _Bucket:
        return self._at(int(now / _BUCKET_S))

    def _at(self, number: int) -> _Bucket:
        buckets = self._buckets
        if not buckets or buckets[-1].number != number:
            buckets.append(_Bucket(number))
        return buckets[-1]


@dataclass(slots=True)
class _Bucket:
    """A few seconds of traffic."""

    number: int
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    errors: int = 0

    def add(self, other: _Bucket) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        self.errors += other.errors


def _sample() -> deque[float]:
    return deque(maxlen=RECENT)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of `values` do not exceed, by nearest rank; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
