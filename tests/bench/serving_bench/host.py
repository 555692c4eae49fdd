"""The engine's process: builds one engine, then runs workloads until its input ends.

    python -m serving_bench.host ENGINE

Speaks JSON lines: the job in, `{"ready_mb": ...}` out, then a workload in and its traces out, as
often as wanted. Needs nothing but the standard library and the engine.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from dataclasses import asdict
from typing import Any, Protocol, TextIO

from serving_bench.memory import peak_mb, reset_peak
from serving_bench.workload import Trace, Workload


class HostedEngine(Protocol):
    """What the `start(job)` of every module in `serving_bench.engines` returns."""

    version: str

    def prepare(self, load: Workload) -> None:
        """Have at hand what `load` needs, before the clock starts."""
        ...

    def run(self, load: Workload) -> list[Trace]:
        """Run `load`; traces in the order of its requests."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def claim_stdout() -> TextIO:
    """The real standard output; whatever else prints there goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def reply(channel: TextIO, message: dict[str, Any]) -> None:
    """Send one line."""
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def serve(name: str, channel: TextIO) -> None:
    """Build the engine `name` and run what comes."""
    job = json.loads(sys.stdin.readline())
    engine: HostedEngine = importlib.import_module(f"serving_bench.engines.{name}").start(job)
    try:
        reply(channel, {"ready_mb": peak_mb(os.getpid()), "version": engine.version})
        for line in sys.stdin:
            load = Workload.parse(line)
            engine.prepare(load)
            reset_peak()
            traces = engine.run(load)
            peak = peak_mb(os.getpid())
            reply(channel, {"traces": [asdict(trace) for trace in traces], "peak_mb": peak})
    finally:
        engine.close()


def main() -> None:
    """Answer every failure with one line before the process ends."""
    channel = claim_stdout()
    try:
        serve(sys.argv[1], channel)
    except Exception as error:
        traceback.print_exc()
        reply(channel, {"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
