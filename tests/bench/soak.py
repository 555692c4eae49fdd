"""Hours at seventy per cent of what the service can do: memory, file handles and latency stay flat.

    python tests/bench/soak.py --minutes 60 --out runs/soak

First closed-loop callers find the capacity; then requests arrive at random moments, `--load` of it
on average. Every minute is a row; the plot has every sample. A machine that is shared is slower in
some minutes than in others: `probe ms` of a core is what the same piece of work took meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from reliability.load import NO_LIMIT, Load, Outcome, ask, counted, quantile
from reliability.processes import PROXY, measured, replica
from reliability.report import table
from reliability.service import APP, Settings, body, running

MIB = 2**20
SAMPLE_S = 5.0
PROBE = "probe ms"
WATCHED = {
    "LM": replica(APP, "LMReplica"),
    "router": replica(APP, "ClusterRouter"),
    "generator": replica(APP, "AdapterGenerator"),
    "learner": replica(APP, "CentroidLearner"),
    "proxy": PROXY,
}


class Probe:
    """A piece of work that tells how fast the machine is, whatever waits for its cores."""

    def __init__(self) -> None:
        self._numbers = np.random.default_rng(0).random(2**17)
        self._memory = np.ones(2**23), np.ones(2**23)

    def __call__(self) -> float:
        """Milliseconds of a core that sorting some numbers and copying 64 MiB took."""
        begun = time.thread_time()
        np.sort(self._numbers)
        np.copyto(*self._memory)
        return 1000 * (time.thread_time() - begun)


def sample(begun: float, probe: Probe) -> dict[str, float]:
    """Memory in MiB and open handles of each kind of process, now, and the machine's speed."""
    found = {"minute": (time.monotonic() - begun) / 60, PROBE: probe()}
    for name, title in WATCHED.items():
        memory, handles = measured(title)
        found |= {f"{name} MiB": memory / MIB, f"{name} handles": handles}
    return found


async def soak(url: str, rate: float, minutes: float, tokens: int) -> dict[str, Any]:
    """Samples and outcomes of `minutes` at `rate` requests a second."""
    numbers = itertools.count(10**6)
    draw = random.Random(0)
    outcomes: list[Outcome] = []
    samples: list[dict[str, float]] = []
    probe = Probe()
    begun = time.monotonic()

    async def watch() -> None:
        while True:
            samples.append(await asyncio.to_thread(sample, begun, probe))
            await asyncio.sleep(SAMPLE_S)

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=NO_LIMIT) as http:

        async def one() -> None:
            outcomes.append(await ask(http, body(next(numbers), tokens)))

        watching = asyncio.create_task(watch())
        async with asyncio.TaskGroup() as group:
            while time.monotonic() - begun < 60 * minutes:
                group.create_task(one())
                await asyncio.sleep(draw.expovariate(rate))
        watching.cancel()
    return {"samples": samples, "outcomes": outcomes, "begun": begun}


def by_minute(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each minute."""
    rows = []
    last = int(max(one["minute"] for one in found["samples"]))
    for minute in range(last + 1):
        begun = found["begun"] + 60 * minute
        mine = [one for one in found["outcomes"] if begun <= one.begun < begun + 60]
        took = [one.took for one in mine if one.kind == "done"]
        first = [one.first - one.begun for one in mine if one.first is not None]
        inside = [one for one in found["samples"] if minute <= one["minute"] < minute + 1]
        end = {**inside[-1], PROBE: quantile([one[PROBE] for one in inside], 0.5)}
        rows.append(
            {
                "minute": minute,
                **counted(mine),
                "p50 s": round(quantile(took, 0.5), 2),
                "p99 s": round(quantile(took, 0.99), 2),
                "first token p50 s": round(quantile(first, 0.5), 2),
                **{key: round(value) for key, value in end.items() if key != "minute"},
            }
        )
    return rows


def slopes(samples: list[dict[str, float]]) -> dict[str, float]:
    """Growth an hour of each column, by least squares over the second half of the samples."""
    half = samples[len(samples) // 2 :]
    minutes = [one["minute"] for one in half]
    return {
        key: round(60 * float(np.polyfit(minutes, [one[key] for one in half], 1)[0]), 1)
        for key in half[0]
        if key != "minute"
    }


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (memory, handles, latency) = pyplot.subplots(
        3, 1, figsize=(8, 9), layout="constrained", sharex=True
    )
    minutes = [one["minute"] for one in found["samples"]]
    for name in WATCHED:
        memory.plot(minutes, [one[f"{name} MiB"] for one in found["samples"]], label=name)
        handles.plot(minutes, [one[f"{name} handles"] for one in found["samples"]], label=name)
    done = [one for one in found["outcomes"] if one.kind == "done"]
    latency.plot(
        [(one.begun - found["begun"]) / 60 for one in done], [one.took for one in done], ".", ms=2
    )
    for axes, label in ((memory, "resident MiB"), (handles, "open handles"), (latency, "answer s")):
        axes.set(ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    memory.legend()
    latency.set(xlabel="minute")
    figure.savefig(path, dpi=110)


async def measure(url: str, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    numbers = itertools.count()
    callers = settings.max_sequences
    load = Load(url, lambda: body(next(numbers), args.tokens), callers)
    async with load.running():
        await asyncio.sleep(args.calibrate)  # the first half warms up
        middle = time.monotonic() - args.calibrate / 2
        ended = [one for one in load.outcomes if one.kind == "done" and one.ended > middle]
    capacity = len(ended) / (args.calibrate / 2)
    found = await soak(url, args.load * capacity, args.minutes, args.tokens)
    return {**found, "capacity": capacity, "rate": args.load * capacity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--calibrate", type=float, default=40, help="seconds")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    settings = Settings(max_queued=64)
    with running(settings) as url:
        found = asyncio.run(measure(url, settings, args))
    rows = by_minute(found)
    summary = {
        "requests/s at capacity": round(found["capacity"], 2),
        "requests/s sent": round(found["rate"], 2),
        **counted(found["outcomes"]),
        "growth an hour": slopes(found["samples"]),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    result = {**summary, "minutes": rows, "samples": found["samples"]}
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    (args.out / "report.md").write_text(table(rows))
    plot(found, args.out / "soak.png")
    print(json.dumps(summary, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
