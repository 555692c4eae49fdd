"""Answers end at their deadline, and give back what they held."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from reliability.load import ask
from reliability.processes import until

from cluster_router.wire.errors import DeadlineError
from cluster_router.wire.types import SamplingParams
from deploy.client import connect

from .conftest import APP, ASKED_FOR, Struck
from .test_disconnects import idle

pytestmark = [pytest.mark.serve, ASKED_FOR]

ENDLESS = 8000
"""Tokens that take far longer than the deadlines here."""


async def test_an_answer_ends_at_its_deadline(struck: Struck) -> None:
    late = struck.body(max_tokens=ENDLESS, timeout_s=1.0)
    async with httpx.AsyncClient(base_url=struck.url, timeout=60) as http:
        whole, streamed = await asyncio.gather(
            http.post("/v1/completions", json=late), ask(http, late)
        )
    assert whole.status_code == 504
    error = whole.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert error["param"] == "timeout_s" and "1 s" in error["message"]
    assert streamed.kind in ("told", "failed")  # by then it may not have begun on a busy machine
    assert '"deadline_exceeded"' in streamed.detail
    await asyncio.to_thread(until, idle, 60)


async def test_handles_raise_it(struck: Struck) -> None:
    with pytest.raises(DeadlineError, match="1 s"):
        await connect(APP).generate(
            "hello", sampling=SamplingParams(max_tokens=ENDLESS, ignore_eos=True), timeout_s=1.0
        )
    await asyncio.to_thread(until, idle, 60)


@pytest.mark.parametrize("timeout_s", [0, -1, 1e9, "1", None])
def test_only_a_number_of_seconds_is_one(struck: Struck, timeout_s: object) -> None:
    body = struck.body(timeout_s=timeout_s)
    answer = httpx.post(f"{struck.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == (200 if timeout_s is None else 400), answer.text
