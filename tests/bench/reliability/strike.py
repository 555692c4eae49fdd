"""Kill -9 processes of a service under load, and see what that cost their callers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from ray import serve
from reliability.load import Load, Outcome, counted, quantile
from reliability.processes import CONTROLLER, PROXY, kill, pids, replica

PARTS = {
    "LM replica": "LMReplica",
    "router": "ClusterRouter",
    "generator": "AdapterGenerator",
    "learner": "CentroidLearner",
    "controller": CONTROLLER,
    "proxy": PROXY,
}


@dataclass(frozen=True)
class Strike:
    """One blow.

    Attributes:
        outcomes: of all requests that ended after it.
        struck: when, on the monotonic clock.
        whole_s: seconds until every process ran again and a request was answered.
        longest_gap_s: longest time in which no request was answered, around the kill.
    """

    parts: Sequence[str]
    outcomes: Sequence[Outcome]
    struck: float
    whole_s: float
    longest_gap_s: float

    @property
    def lost(self) -> list[Outcome]:
        """Requests that did not come to their end."""
        return [one for one in self.outcomes if one.kind != "done"]

    def row(self) -> dict[str, Any]:
        """For a report."""
        done = [one.took for one in self.outcomes if one.kind == "done"]
        return {
            "killed": ", ".join(self.parts),
            "requests": len(self.outcomes),
            **counted(self.outcomes),
            "whole again s": round(self.whole_s, 1),
            "longest gap s": round(self.longest_gap_s, 1),
            "p50 s": round(quantile(done, 0.5), 2),
            "details": sorted({f"{one.status} {one.detail[:160]}" for one in self.lost}),
        }


async def strike(
    app: str,
    url: str,
    parts: Sequence[str],
    body: Callable[[], dict[str, Any]],
    callers: int = 8,
    before: int = 16,
    within_s: float = 60,
) -> Strike:
    """Kill a process of each of `parts` at once while `callers` call.

    Raises:
        AssertionError: the service is not whole again within `within_s`.
    """
    titles = [
        name if (name := PARTS[part]).startswith("ray::") else replica(app, name) for part in parts
    ]
    counts = {title: len(pids(title)) for title in titles}
    load = Load(url, body, callers)
    async with load.running():
        async with asyncio.timeout(within_s):
            while len([one for one in load.outcomes if one.kind == "done"]) < before:
                await asyncio.sleep(0.05)
        struck = time.monotonic()
        gone = {await asyncio.to_thread(kill, title) for title in titles}
        async with asyncio.timeout(within_s):
            while not await _whole(app, url, counts, gone):
                await asyncio.sleep(0.2)
        whole = time.monotonic()
        answered = len(load.outcomes)
        while len(load.outcomes) < answered + callers:
            await asyncio.sleep(0.05)
    after = [one for one in load.outcomes if one.ended > struck]
    ends = sorted(one.ended for one in load.outcomes if one.kind == "done" and one.ended > struck)
    gaps = [late - early for early, late in zip([struck, *ends], ends, strict=False)]
    return Strike(parts, after, struck, whole - struck, max(gaps, default=float("inf")))


async def _whole(app: str, url: str, counts: dict[str, int], gone: set[int]) -> bool:
    for title, count in counts.items():
        if len(await asyncio.to_thread(pids, title) - gone) < count:
            return False
    try:
        async with httpx.AsyncClient(timeout=5) as http:
            if (await http.get(f"{url}/ready")).status_code != 200:
                return False
        status = await asyncio.to_thread(serve.status)
    except Exception:  # the controller or the proxy is on its way back
        return False
    return status.applications[app].status == "RUNNING"
