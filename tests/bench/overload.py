"""Ten times as many callers as the service takes, and a crowd of callers who leave.

    python tests/bench/overload.py --seconds 60 --out runs/overload

Three phases of closed-loop callers: `full` has as many as the engine runs and queues, `over` ten
times as many, who wait as long as a refusal tells them, `after` as many as `full` again. Then
`--leavers` callers, `full` at a time, leave at random moments, and a last phase shows what of the
throughput is left.
"""

from __future__ import annotations

import reliability.environment  # noqa: F401  # before Ray

# isort: split
import argparse
import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from reliability.load import NO_LIMIT, Load, ask, counted, quantile
from reliability.processes import PROXY, measured, replica
from reliability.report import table
from reliability.service import APP, Settings, body, running

from lm_workers.engine import EngineStats

Body = Callable[[], dict[str, Any]]
MIB = 2**20
TITLES = {
    "LM MiB": replica(APP, "LMReplica"),
    "router MiB": replica(APP, "ClusterRouter"),
    "proxy MiB": PROXY,
}
LONG = 400  # tokens of answers that nobody waits for the end of


async def phase(name: str, url: str, make: Body, callers: int, seconds: float) -> dict[str, Any]:
    """One row."""
    load = Load(url, make, callers)
    begun = time.monotonic()
    async with load.running():
        await asyncio.sleep(seconds)
        over = time.monotonic()
        memory = {key: measured(title)[0] // MIB for key, title in TITLES.items()}
    # The ramp: requests of the first and the last moments meet another load.
    done = [one for one in load.outcomes if one.kind == "done" and one.ended <= over]
    settled = [one for one in done if one.begun > begun + 0.2 * seconds] or done
    first = [one.first - one.begun for one in settled if one.first is not None]
    waits = [one.retry_after for one in load.outcomes if one.kind == "refused"]
    return {
        "phase": name,
        "callers": callers,
        **counted(load.outcomes),
        "done/s": round(len(done) / (over - begun), 2),
        "p50 s": round(quantile([one.took for one in settled], 0.5), 2),
        "p99 s": round(quantile([one.took for one in settled], 0.99), 2),
        "first token p50 s": round(quantile(first, 0.5), 2),
        "Retry-After p50 s": round(quantile(waits, 0.5), 1) if waits else "",
        **memory,
    }


async def recovery(url: str, make: Body, plain_s: float) -> float:
    """Seconds until a request is taken, and answered within twice the time of an idle one."""
    begun = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=NO_LIMIT) as http:
        while True:
            one = await ask(http, make())
            if one.kind == "done" and one.took < 2 * plain_s:
                return one.begun - begun


async def leave(url: str, make: Body, leavers: int, at_once: int, longest_s: float) -> int:
    """How many left before their answer was complete; who is refused comes again."""
    draw = random.Random(0)
    crowd = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=NO_LIMIT) as http:

        async def one() -> bool:
            async with crowd:
                while True:
                    try:
                        async with asyncio.timeout(draw.uniform(0, longest_s)):
                            outcome = await ask(http, make())
                    except TimeoutError:
                        return True
                    if outcome.kind != "refused":
                        return False
                    await asyncio.sleep(0.1)

        return sum(await asyncio.gather(*(one() for _ in range(leavers))))


async def idle() -> tuple[EngineStats, float]:
    """What the engine holds when nobody calls any more, sound, and after how many seconds."""
    handle = serve.get_deployment_handle("LMReplica", APP)
    begun = time.monotonic()
    while True:
        stats: EngineStats = await handle.check_integrity.remote()
        if (stats.running, stats.waiting, stats.kv_free) == (0, 0, 1.0):
            return stats, time.monotonic() - begun
        if time.monotonic() - begun > 60:
            raise AssertionError(f"held by nobody: {stats}")
        await asyncio.sleep(0.1)


async def measure(url: str, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    numbers = itertools.count()

    def make() -> dict[str, Any]:
        return body(next(numbers), args.tokens)

    capacity = settings.max_sequences + settings.max_queued
    rows = [await phase("warm-up", url, make, capacity, args.seconds / 4)]
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=NO_LIMIT) as http:
        plain_s = quantile([(await ask(http, make())).took for _ in range(5)], 0.5)
    rows.append(await phase("full", url, make, capacity, args.seconds))
    rows.append(await phase("over", url, make, args.times * capacity, args.seconds))
    recovered_s = await recovery(url, make, plain_s)
    rows.append(await phase("after", url, make, capacity, args.seconds / 2))
    left = await leave(
        url, lambda: body(next(numbers), LONG), args.leavers, capacity, rows[1]["p50 s"]
    )
    stats, freed_s = await idle()
    rows.append(await phase("after leavers", url, make, capacity, args.seconds / 2))
    return {
        "capacity": capacity,
        "idle request s": round(plain_s, 2),
        "recovered within s": round(recovered_s, 2),
        "leavers": args.leavers,
        "left before their end": left,
        "all given back within s": round(freed_s, 2),
        "preemptions": stats.preemptions,
        "phases": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--leavers", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/overload"))
    args = parser.parse_args()
    settings = Settings()
    with running(settings) as url:
        found = asyncio.run(measure(url, settings, args))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(found, indent=1))
    (args.out / "report.md").write_text(table(found["phases"]))
    print(json.dumps({**found, "phases": None}, indent=1))
    print(table(found["phases"]))


if __name__ == "__main__":
    main()
