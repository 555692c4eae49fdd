"""What stands in the proxy, around stand-ins for the proxy that lose routers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from cluster_router.openai import front
from cluster_router.openai.front import Front

App = Callable[[Any, Any, Any], Awaitable[None]]
TEXT = [(b"content-type", b"text/plain")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def body_of(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def answer(send: Any, status: int, body: bytes, headers: Any = TEXT) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Losing:
    """Loses the first `lost` requests without a word, then echoes."""

    def __init__(self, lost: int) -> None:
        self.lost, self.seen = lost, list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["headers"].count((b"x", b"1")) == 0
        scope["headers"].append((b"x", b"1"))
        self.seen.append(await body_of(receive))
        if len(self.seen) > self.lost:
            await answer(send, 200, self.seen[-1])


def client(app: App, **settings: Any) -> httpx.AsyncClient:
    wrapped = Front(app, **{"pause_s": 0.001} | settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://test")


async def parts() -> Any:
    for part in (b"a", b"b", b"c"):
        yield part


async def test_a_lost_request_is_sent_again_as_it_came() -> None:
    app = Losing(2)
    async with client(app) as http:
        found = await http.post("/", content=parts())
    assert (found.status_code, found.content, app.seen) == (200, b"abc", [b"abc"] * 3)


async def test_not_for_ever() -> None:
    app = Losing(99)
    async with client(app, attempts=3) as http:
        found = await http.post("/", content=b"x")
    assert (found.status_code, len(app.seen)) == (503, 3)
    assert found.json()["error"]["code"] == "unavailable"


async def test_not_with_a_body_too_long_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "MAX_KEPT_BYTES", 2)
    app = Losing(99)
    async with client(app) as http:
        found = await http.post("/", content=b"xyz")
    assert (found.status_code, len(app.seen)) == (503, 1)


@pytest.mark.parametrize(
    ("status", "headers", "becomes", "code"),
    [
        (429, [*TEXT, (b"retry-after", b"7")], 429, "overloaded"),
        (503, TEXT, 503, "unavailable"),
        (408, TEXT, 504, "deadline_exceeded"),
    ],
)
async def test_the_proxys_refusals_are_told_in_openais_form(
    status: int, headers: Any, becomes: int, code: str
) -> None:
    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, status, b"dropped", [*headers, (b"x-request-id", b"mine")])

    async with client(refusing) as http:
        found = await http.get("/")
    assert (found.status_code, found.json()["error"]["code"]) == (becomes, code)
    assert found.headers.get("retry-after") == ("7" if status == 429 else None)
    assert found.headers["x-request-id"] == "mine"


async def test_a_routers_own_answers_are_passed_on() -> None:
    async def busy(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, 503, b'{"own": 1}', [(b"content-type", b"application/json")])

    async with client(busy) as http:
        found = await http.get("/")
    assert (found.status_code, found.json()) == (503, {"own": 1})


async def test_a_stream_that_breaks_off_ends_with_an_error() -> None:
    calls = 0

    async def breaking(scope: Any, receive: Any, send: Any) -> None:
        nonlocal calls
        calls += 1
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        event = b'data: {"text":"x"}\n\n'
        await send({"type": "http.response.body", "body": event, "more_body": True})

    async with client(breaking) as http:
        found = await http.get("/")
    *_, last = found.text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert calls == 1


async def test_who_takes_nothing_is_taken_for_gone() -> None:
    told: list[str] = []

    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        leaving = asyncio.ensure_future(receive())
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
            await asyncio.sleep(0)
        told.append(leaving.result()["type"])

    taken: list[Any] = []

    async def stuck(message: Any) -> None:
        taken.append(message)
        if len(taken) > 3:
            await asyncio.Event().wait()

    first = True

    async def receive() -> Any:
        nonlocal first
        if not first:
            await asyncio.Event().wait()
        first = False
        return {"type": "http.request", "body": b""}

    async with asyncio.timeout(10):
        scope = {"type": "http", "headers": []}
        await Front(streaming, stall_s=0.05)(scope, receive, stuck)
    assert told == ["http.disconnect"] and len(taken) == 4


async def test_a_caller_who_leaves_is_not_served_again() -> None:
    calls = 0

    async def losing(scope: Any, receive: Any, send: Any) -> None:
        nonlocal calls
        calls += 1
        while (await receive())["type"] != "http.disconnect":
            pass

    messages = [{"type": "http.request", "body": b""}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError(message)

    await Front(losing)({"type": "http", "headers": []}, receive, send)
    assert calls == 1
