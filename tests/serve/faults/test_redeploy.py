"""A new bundle under load: nobody notices but by the update's name."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from reliability.bundles import write_bundle
from reliability.load import Load, ask, counted

from .conftest import ASKED_FOR, Struck

pytestmark = [pytest.mark.serve, ASKED_FOR]


async def test_a_new_bundle_comes_without_a_failed_request(struck: Struck) -> None:
    newer = struck.bundle.with_name("newer")
    write_bundle(struck.model, newer, seed=1)

    def clusters() -> list[dict[str, Any]]:
        answer = httpx.get(f"{struck.url}/v1/clusters", timeout=60).raise_for_status()
        served: list[dict[str, Any]] = answer.json()["data"]
        return served

    before = clusters()
    load = Load(struck.url, struck.body, callers=4)
    async with (
        httpx.AsyncClient(base_url=struck.url, timeout=120) as http,
        load.running(),
    ):
        long = asyncio.create_task(ask(http, struck.body(max_tokens=4000)))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(struck.deploy, bundle=str(newer))
        served = clusters()
        largest = max(served, key=lambda one: one["size"])
        told = await ask(http, struck.body(adaptation=largest["id"]))
        assert (await long).kind == "done", "on the replica that it had begun on"
    assert counted(load.outcomes).keys() == {"done"}, [
        one for one in load.outcomes if one.kind != "done"
    ]
    assert told.adaptation["adapter_key"] == largest["adapter_key"]
    assert not {one["adapter_key"] for one in served} & {one["adapter_key"] for one in before}
