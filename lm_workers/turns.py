"""Turns: when those whom a full engine refuses should come again."""

from __future__ import annotations

import heapq
import time
from collections import deque

_PACE = 32
"""Answers over whose ends the pace is taken."""

_UNKNOWN_PACE_S = 0.1
"""Seconds an answer, until the engine was first seen to be busy."""

_LONGEST_WAIT_S = 60.0
"""OpenAI's clients take no longer wait for an answer to how long they should."""


class Turns:
    """Tells each who is refused a turn of his own, at the pace of the engine.

    If all were told the same, all would come at once, and refusing them is work as well.
    """

    def __init__(self) -> None:
        # The latest ends of answers while others waited: at no other time do they show the pace.
        self._ends: deque[float] = deque(maxlen=_PACE)
        self._pace_s = _UNKNOWN_PACE_S
        # When those who were refused were told to come again, as a heap.
        self._returns: list[float] = []

    def ended(self, waiting: int) -> None:
        """An answer has ended, while so many requests waited."""
        if waiting:
            self._ends.append(time.monotonic())
        else:
            self._ends.clear()

    def idle(self) -> None:
        """An idle engine owes nobody a turn: who comes first is first."""
        self._returns.clear()

    def next_in(self, waiting: int) -> float:
        """Seconds after which who is refused now should come again.

        By then, at the latest pace, all will have begun that wait now or were told to come before.
        """
        now = time.monotonic()
        while self._returns and self._returns[0] <= now:
            heapq.heappop(self._returns)
        if len(self._ends) > 1:
            self._pace_s = (now - self._ends[0]) / len(self._ends)
        wait = max(1.0, self._pace_s * (waiting + len(self._returns)))
        if wait >= _LONGEST_WAIT_S:
            return _LONGEST_WAIT_S
        heapq.heappush(self._returns, now + wait)
        return wait
