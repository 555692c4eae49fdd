"""Requests given to an ASGI application as they are, with nothing in between to correct them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from reliability.inputs import Input

App = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes


async def send(app: App, one: Input, within_s: float) -> Reply:
    """The answer to one input.

    Raises:
        TimeoutError: there is none in time.
        Exception: whatever the application let out.
    """
    path, _, query = one.path.partition("?")
    headers = [(name.encode(), value.encode("utf-8")) for name, value in one.headers]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": one.method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": headers,
        "client": ("test", 1),
        "server": ("test", 80),
    }
    parts = list(one.parts) or [b""]
    status, body = 0, b""
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if parts:
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def reply(message: dict[str, Any]) -> None:
        nonlocal status, body
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            body += message.get("body", b"")

    async with asyncio.timeout(within_s):
        await app(scope, receive, reply)
    return Reply(status, body)


def fault(one: Input, answer: Reply) -> str | None:
    """What is wrong with an answer; None where nothing is."""
    if answer.status == 0:
        return "no answer"
    if answer.status >= 500:
        return f"status {answer.status}"
    if b"internal_error" in answer.body:
        return "an internal error in the stream"
    if answer.status < 400 or one.method == "HEAD":
        return None
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status} without OpenAI's error body"
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return f"status {answer.status} with an incomplete error"
    return None
