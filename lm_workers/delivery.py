"""From the engine's thread to the streams of event loops, in chunks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cluster_router.wire.types import TokenChunk

Outcome = TokenChunk | Exception
Told = tuple[asyncio.Queue[Outcome], Outcome]

_LONGEST_HOLD_S = 0.1
"""Longest that a token waits for the next ones of its stream."""


def call_in(loop: asyncio.AbstractEventLoop, tell: Callable[..., None], *what: object) -> None:
    """Call `tell` in the thread of `loop`; one that is closed must not end this thread."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(tell, *what)


@dataclass(slots=True)
class _Stream:
    """Who waits for an answer, and what is not sent yet; None before the first chunk."""

    loop: asyncio.AbstractEventLoop
    outcomes: asyncio.Queue[Outcome]
    held: list[TokenChunk] | None = None


class Streams:
    """The streams that wait for answers, and when they are told what came.

    What waits is sent for all streams at once: each time that an event loop wakes, here and in
    whatever the chunks pass through later, takes time from the threads that compute.

    Args:
        chunks_per_s: chunks that all streams together send in a second, about. Where more tokens
            come, those of a stream wait for each other, though never the first of a stream, nor
            the last, and none for longer than a tenth of a second, give or take half a step. None
            sends each as it comes.
        clock: seconds, monotonic.
    """

    def __init__(
        self, chunks_per_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._chunks_per_s, self._clock = chunks_per_s, clock
        self._streams: dict[str, _Stream] = {}
        self._sent = self._stepped = clock()

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._streams))

    def open(
        self, name: str, loop: asyncio.AbstractEventLoop, outcomes: asyncio.Queue[Outcome]
    ) -> None:
        """From now on what comes for `name` is put into `outcomes`, in the thread of `loop`."""
        self._streams[name] = _Stream(loop, outcomes)

    def close(self, name: str, outcomes: asyncio.Queue[Outcome]) -> bool:
        """Forget `name`; False if it has ended, or is by now another stream of that name."""
        stream = self._streams.get(name)
        if stream is None or stream.outcomes is not outcomes:
            return False
        del self._streams[name]
        return True

    def deliver(self, told: Iterable[tuple[str, Outcome]]) -> int:
        """Take what came of a step, and send what is due.

        Returns:
            How many streams have ended by it: nothing is left to abort of these, and the next
            stream of such a name is another one.
        """
        now, sending, ended = self._clock(), 0, 0
        due: list[tuple[_Stream, Outcome]] = []
        for name, outcome in told:
            stream = self._streams[name]
            sending += 1
            if isinstance(outcome, Exception) or outcome.finish_reason is not None:
                del self._streams[name]
                ended += 1
                due += _last(stream, outcome)
            elif stream.held is None:
                stream.held = []
                due.append((stream, outcome))
            else:
                stream.held.append(outcome)
        step_s, self._stepped = now - self._stepped, now
        if now + step_s / 2 >= self._sent + self._hold_s(sending):
            due += self._held()
            self._sent = now
        _send(due)
        return ended

    def _hold_s(self, streams: int) -> float:
        if self._chunks_per_s is None:
            return 0.0
        return min(_LONGEST_HOLD_S, streams / self._chunks_per_s)

    def _held(self) -> Iterator[tuple[_Stream, Outcome]]:
        for stream in self._streams.values():
            if stream.held:
                yield stream, TokenChunk.joined(stream.held)
                stream.held = []


def _last(stream: _Stream, outcome: Outcome) -> list[tuple[_Stream, Outcome]]:
    """What ends a stream, after or with what was held of it."""
    held = stream.held or []
    if isinstance(outcome, Exception):
        before = [(stream, TokenChunk.joined(held))] if held else []
        return [*before, (stream, outcome)]
    return [(stream, TokenChunk.joined([*held, outcome]))]


def _send(due: Iterable[tuple[_Stream, Outcome]]) -> None:
    """All of a loop at once."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[Told]] = defaultdict(list)
    for stream, outcome in due:
        by_loop[stream.loop].append((stream.outcomes, outcome))
    for loop, told in by_loop.items():
        call_in(loop, _put_all, told)


def _put_all(told: Iterable[Told]) -> None:
    for outcomes, outcome in told:
        outcomes.put_nowait(outcome)
