"""History: what was counted in the last minutes, by key and moment; bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cluster_router.console.counts import Counts, Numbers
from cluster_router.tally import Key
from cluster_router.traffic import OTHER

Chosen = Callable[[Key], bool]
"""Whose counts are wanted."""

STEP_S = 5.0
STEPS = 180
_MOST_KEYS = 256


class History:
    """Counts in steps of STEP_S seconds, STEPS of them.

    Times are seconds of any clock that never goes back.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, dict[Key, Numbers]]] = deque(maxlen=STEPS)

    def add(self, now: float, key: Key, numbers: Numbers) -> None:
        """Count `numbers` [WIDTH] as of `now`."""
        step = self._step(now)
        if key not in step and len(step) >= _MOST_KEYS:
            key = OTHER
        held = step.get(key)
        step[key] = numbers if held is None else held + numbers

    def covered(self, now: float, seconds: float) -> float:
        """Seconds that a window of `seconds` covers."""
        return max(1.0, now - ((now - seconds) // STEP_S) * STEP_S)

    def window(self, now: float, seconds: float, chosen: Chosen) -> Counts:
        """The sum over the last `seconds`, in whole steps and the one that has begun."""
        first = int((now - seconds) // STEP_S)
        return Counts.of(
            numbers
            for at, step in self._steps
            if at >= first
            for key, numbers in step.items()
            if chosen(key)
        )

    def by_key(self, now: float, seconds: float, chosen: Chosen) -> dict[Key, Counts]:
        """The same for each key that had any."""
        first = int((now - seconds) // STEP_S)
        parts: dict[Key, list[Numbers]] = {}
        for at, step in self._steps:
            for key, numbers in step.items():
                if at >= first and chosen(key):
                    parts.setdefault(key, []).append(numbers)
        return {key: Counts.of(found) for key, found in parts.items()}

    def steps(self, now: float, chosen: Chosen, count: int = STEPS) -> list[Counts]:
        """The last `count` steps, oldest first; the one that has begun is left out."""
        last = int(now // STEP_S)
        held = dict(self._steps)
        return [
            Counts.of(n for key, n in held.get(at, {}).items() if chosen(key))
            for at in range(last - count, last)
        ]

    def _step(self, now: float) -> dict[Key, Numbers]:
        at = int(now // STEP_S)
        if not self._steps or self._steps[-1][0] < at:
            self._steps.append((at, {}))
        return self._steps[-1][1]
