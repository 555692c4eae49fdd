"""What watching a stream costs its router:  python tests/bench/observation_cost.py

Microseconds of one core for each chunk, and for each stream beside that; the best and the median
of several rounds. Metrics are recorded as in a replica, by Ray's own classes; tracing is off.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster_router.stream_log import log_stream
from cluster_router.tracing import trace_stream
from cluster_router.traffic import Listener, Traffic
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    SamplingParams,
    TokenChunk,
    TokenizedRequest,
)
from deploy.reporting import TrafficReporter

CHUNKS, STREAMS, ROUNDS = 200, 100, 15


def cost(listeners: list[Listener]) -> tuple[list[float], list[float]]:
    """Seconds for one chunk and for the rest of one stream, in each round."""
    assignment = Assignment(AdapterKey("base", "hyper", 3, 1), 3, 0.7)
    request = TokenizedRequest("r", (1,) * 100, SamplingParams(), assignment)
    chunk = TokenChunk("r", text="word", tokens=(1,))
    last = TokenChunk("r", text="word", tokens=(1,), finish_reason="stop")
    traffic = Traffic(listeners=listeners)

    def streams(chunks: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(STREAMS):
                flight = traffic.begin(request)
                for _ in range(chunks):
                    flight.chunk(chunk)
                flight.chunk(last)
                flight.end()

        return run

    whole = [timed(streams(CHUNKS)) / STREAMS for _ in range(ROUNDS)]
    ends = [timed(streams(0)) / STREAMS for _ in range(ROUNDS)]
    rest = statistics.median(ends)
    return [(one - rest) / CHUNKS for one in whole], ends


def timed(run: Callable[[], None]) -> float:
    """Seconds that `run` takes of this thread."""
    begun = time.thread_time()
    run()
    return time.thread_time() - begun


def main() -> None:
    """Print the table."""
    logging.getLogger("cluster_router").addHandler(logging.NullHandler())
    logging.getLogger("cluster_router").setLevel(logging.INFO)
    logging.getLogger("cluster_router").propagate = False
    everything: list[Listener] = [TrafficReporter(256).ended, log_stream, trace_stream]
    for name, listeners in (("counting alone", []), ("with metrics and log", everything)):
        chunk, stream = cost(listeners)
        print(
            f"{name}: chunk {min(chunk) * 1e6:.2f} us (median {statistics.median(chunk) * 1e6:.2f})"
            f", stream {min(stream) * 1e6:.0f} us (median {statistics.median(stream) * 1e6:.0f})"
        )


if __name__ == "__main__":
    main()
