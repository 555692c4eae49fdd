"""Clients of an engine that is called step by step. Standard library only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from serving_bench.workload import Request, Trace, Workload


@dataclass(frozen=True)
class Arrival:
    """Tokens that one step made for request `index`."""

    index: int
    tokens: tuple[int, ...]
    finished: bool


class SteppedEngine(Protocol):
    """What `drive` needs of an engine."""

    def add(self, index: int, request: Request, output_tokens: int) -> None:
        """Queue a request: greedy, exactly `output_tokens` long."""
        ...

    def step(self) -> Iterable[Arrival]:
        """Advance every request that is queued."""
        ...


def drive(
    engine: SteppedEngine, load: Workload, clock: Callable[[], float] = time.perf_counter
) -> list[Trace]:
    """Run a workload; the traces are in the order of its requests."""
    waiting = deque(enumerate(load.requests))
    traces = [Trace(0.0, []) for _ in load.requests]
    running, began = 0, clock()
    while waiting or running:
        while waiting and running < load.concurrency:
            index, request = waiting.popleft()
            traces[index].sent = clock() - began
            engine.add(index, request, load.output_tokens)
            running += 1
        arrivals = list(engine.step())  # before the clock is read
        now = clock() - began
        for arrival in arrivals:
            trace = traces[arrival.index]
            if arrival.tokens:
                trace.times.append(now)
                trace.tokens += arrival.tokens
                trace.count += len(arrival.tokens)
            running -= arrival.finished
    return traces
