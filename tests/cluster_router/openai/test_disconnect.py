"""Callers who leave, over a real socket: ASGITransport cannot show this."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

MODEL = "tiny/bytes"
BODY = {"model": MODEL, "prompt": "xxx", "max_tokens": 9}


@pytest.fixture
async def url(app: FastAPI) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()
    yield f"http://{host}:{port}/v1/completions"
    server.should_exit = True
    await running


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_a_stream_closes_the_workers_streams(url: str, worker: Any, n: int) -> None:
    worker.stalls_after = 2
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", url, json=BODY | {"stream": True, "n": n}) as answer,
    ):
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        assert worker.open == n
    await until(lambda: worker.open == 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_before_the_first_token_closes_them_too(
    url: str, worker: Any, stream: bool, n: int
) -> None:
    worker.stalls_after = 0
    async with httpx.AsyncClient() as client:
        call = asyncio.create_task(client.post(url, json=BODY | {"stream": stream, "n": n}))
        await until(lambda: worker.open == n)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await until(lambda: worker.open == 0)


async def test_cancelling_the_server_side_task_closes_them(app: FastAPI, worker: Any) -> None:
    """As Ray Serve does it: the replica's task is cancelled."""
    worker.stalls_after = 1
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for stream in (True, False):
            call = asyncio.create_task(
                client.post("/v1/completions", json=BODY | {"stream": stream, "n": 2})
            )
            await until(lambda: worker.open == 2)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await until(lambda: worker.open == 0)


async def test_the_server_serves_on_after_callers_left(url: str, worker: Any) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.post(url, json=BODY)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == "abcdefghi"
