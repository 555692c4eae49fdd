"""Callers who leave, and callers who hardly read."""

from __future__ import annotations

import asyncio
import json
import random
from urllib.parse import urlsplit

import httpx
import pytest
from reliability.load import NO_LIMIT, ask
from reliability.processes import until

from .conftest import ASKED_FOR, Struck, integrity

pytestmark = [pytest.mark.serve, ASKED_FOR]

LEAVERS = 150
LONG = 4000


def idle() -> bool:
    """Every replica is sound and holds nothing."""
    return all((one.running, one.waiting, one.kv_free) == (0, 0, 1.0) for one in integrity())


async def test_nothing_is_left_of_callers_who_leave(struck: Struck) -> None:
    draw = random.Random(0)
    crowd = asyncio.Semaphore(20)
    async with httpx.AsyncClient(base_url=struck.url, timeout=60, limits=NO_LIMIT) as http:

        async def leave() -> bool:
            async with crowd:
                try:
                    async with asyncio.timeout(draw.uniform(0, 0.4)):
                        await ask(http, struck.body(max_tokens=LONG))
                except TimeoutError:
                    return True
                return False

        assert sum(await asyncio.gather(*(leave() for _ in range(LEAVERS)))) > LEAVERS / 2
        await asyncio.to_thread(until, idle, 60)
        assert (await ask(http, struck.body())).kind == "done"


async def test_who_hardly_reads_holds_nobody_up(struck: Struck) -> None:
    url = urlsplit(struck.url)
    body = struck.body(max_tokens=LONG, temperature=0)
    content = json.dumps(body | {"stream": True}).encode()
    head = (
        f"POST {url.path}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1024)
    writer.write(head.encode() + content)
    assert (await reader.read(1)) == b"H"
    await asyncio.to_thread(until, idle, 60)  # the engine has long gone on to others
    async with asyncio.timeout(60):
        rest = await reader.read()
    writer.close()
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    events = [json.loads(one[6:]) for one in rest.split(b"\n") if one.startswith(b"data: {")]
    read = "".join(event["choices"][0]["text"] for event in events)
    async with httpx.AsyncClient(timeout=120) as http:
        whole = (await http.post(f"{struck.url}/v1/completions", json=body)).json()
    assert read == whole["choices"][0]["text"], "nothing is missing"
