"""Ten times as many callers as the application takes. `tests/bench/overload.py` has the figures."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from reliability.load import NO_LIMIT, Load, ask, counted
from reliability.processes import measured, replica, until

from .conftest import APP, ASKED_FOR, CAPACITY, Struck, integrity

pytestmark = [pytest.mark.serve, ASKED_FOR]

LM = replica(APP, "LMReplica")
MIB = 2**20


async def test_ten_times_the_capacity(struck: Struck) -> None:
    def body() -> dict[str, object]:
        return struck.body(max_tokens=64)

    memory, _ = measured(LM)
    load = Load(struck.url, body, 10 * CAPACITY)
    async with load.running():
        while counted(load.outcomes).get("done", 0) < 2 * CAPACITY:
            await asyncio.sleep(0.1)
    assert set(counted(load.outcomes)) == {"done", "refused"}, counted(load.outcomes)
    for one in load.outcomes:
        if one.kind == "refused":
            assert json.loads(one.detail)["error"]["code"] == "overloaded"
            assert one.retry_after >= 1
    assert measured(LM)[0] - memory < 64 * MIB
    async with httpx.AsyncClient(base_url=struck.url, timeout=60, limits=NO_LIMIT) as http:
        assert (await ask(http, body())).kind == "done"
    await asyncio.to_thread(until, lambda: all(one.running == 0 for one in integrity()), 30)
