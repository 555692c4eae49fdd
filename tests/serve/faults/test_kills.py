"""kill -9 under load, on the running application; `tests/bench/faults.py` measures it."""

from __future__ import annotations

import httpx
import pytest
from reliability.strike import Strike, strike

from .conftest import APP, ASKED_FOR, Struck

pytestmark = [pytest.mark.serve, ASKED_FOR]

CALLERS = 6


async def strike_at(struck: Struck, *parts: str) -> Strike:
    found = await strike(APP, struck.url, parts, struck.body, CALLERS, within_s=120)
    print(found.row())
    return found


async def test_nobody_notices_the_loss_of_what_stands_aside(struck: Struck) -> None:
    found = await strike_at(struck, "learner", "generator", "controller")
    assert found.outcomes and not found.lost, found.row()


async def test_an_lm_replica_takes_only_what_it_had_begun(struck: Struck) -> None:
    found = await strike_at(struck, "LM replica")
    assert {one.kind for one in found.lost} <= {"told"}, found.row()
    assert all(one.begun < found.struck for one in found.lost)
    assert all('"code":"unavailable"' in one.detail for one in found.lost)


async def test_clusters_survive_the_loss_of_everything(struck: Struck) -> None:
    before = httpx.get(f"{struck.url}/v1/clusters").json()
    parts = ["router", "learner", "generator", "LM replica"]
    found = await strike_at(struck, *parts)
    assert {one.kind for one in found.lost} <= {"told"}, found.row()
    assert all(one.begun < found.struck for one in found.lost)
    after = httpx.get(f"{struck.url}/v1/clusters").json()
    assert after["snapshot_version"] >= before["snapshot_version"] > 1
