"""Front: what stands before routers in an HTTP proxy, since a router may be lost as well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster_router.openai.errors import error_answer
from cluster_router.wire.errors import (
    ChameleonError,
    DeadlineError,
    OverloadedError,
    UnavailableError,
)

MAX_KEPT_BYTES = 2**23
"""Of a body, in case it has to be sent again; a request with a longer one is not."""

_LOST = "The router that served this request was lost; send it again."


@dataclass
class _Exchange:
    """One request and what has become of it."""

    receive: Receive
    send: Send
    stall_s: float
    kept: list[Message] = field(default_factory=list)
    size: int = 0
    started: bool = False
    ended: bool = False
    events: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def repeatable(self) -> bool:
        return not self.started and not self.gone.is_set() and self.size <= MAX_KEPT_BYTES

    def replayed(self) -> Receive:
        """What the caller sends, from its beginning."""
        place = 0

        async def receive() -> Message:
            nonlocal place
            if place == len(self.kept):
                message = await self._next()
                if message["type"] != "http.request":
                    return message
                self.size += len(message.get("body", b""))
                self.kept.append(message)
            place += 1
            return self.kept[place - 1]

        return receive

    async def _next(self) -> Message:
        """The caller's next message; that it has gone, once it takes nothing any more."""
        real = asyncio.ensure_future(self.receive())
        gone = asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait((real, gone), return_when=asyncio.FIRST_COMPLETED)
            message: Message = real.result() if real.done() else {"type": "http.disconnect"}
        finally:
            real.cancel()
            gone.cancel()
        if message["type"] == "http.disconnect":
            self.gone.set()
        return message

    async def reply(self, message: Message) -> None:
        """Pass a message on to the caller, unless it is gone."""
        if message["type"] == "http.response.start":
            self.started = True
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            self.events = kind.startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        if self.gone.is_set():
            return
        try:
            async with asyncio.timeout(self.stall_s):
                await self.send(message)
        except TimeoutError:
            self.gone.set()


class Front:
    """ASGI middleware for Serve's proxy: lost requests are sent again, all errors have one form.

    A request whose answer has not begun when its router is lost goes to the next router. A stream
    that has begun ends with an error event. What the proxy itself refuses, in plain text, is told
    in OpenAI's form. A caller who takes nothing for `stall_s` is taken for gone, so that answers do
    not pile up for those who do not read them.

    Args:
        app: the proxy.
        attempts: how often one request is sent.
        pause_s: before the second attempt; doubled before each later one.
        stall_s: longest that one part of an answer may wait for its caller.
    """

    def __init__(
        self, app: ASGIApp, attempts: int = 4, pause_s: float = 0.2, stall_s: float = 60.0
    ) -> None:
        self._app = app
        self._attempts, self._pause_s, self._stall_s = attempts, pause_s, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._stall_s)
        for attempt in range(self._attempts):
            again = dict(scope, headers=list(scope["headers"]))  # the proxy adds to them
            await self._app(again, exchange.replayed(), _in_our_form(exchange.reply))
            if not exchange.repeatable:
                break
            await asyncio.sleep(self._pause_s * 2**attempt)
        await _concluded(exchange)


async def _concluded(exchange: _Exchange) -> None:
    """Say what is left to say where the answer has no end."""
    if exchange.ended or exchange.gone.is_set():
        return
    if not exchange.started:
        await error_answer(UnavailableError(_LOST), "").response()(
            {"type": "http"}, exchange.receive, exchange.reply
        )
    elif exchange.events:
        body = json.dumps(error_answer(UnavailableError(_LOST), "").body)
        event = f"data: {body}\n\n".encode()
        await exchange.reply({"type": "http.response.body", "body": event, "more_body": False})


def _in_our_form(reply: Callable[[Message], Awaitable[None]]) -> Send:
    """`reply`, with the proxy's own refusals replaced."""
    replaced = False

    async def send(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start":
            headers = Headers(raw=message.get("headers", []))
            error = _refusal(message["status"], headers)
            replaced = error is not None
            if error is not None:
                answer = error_answer(error, "").response()
                if "x-request-id" in headers:
                    answer.headers["x-request-id"] = headers["x-request-id"]
                await answer({"type": "http"}, _nothing, reply)
        if not replaced:
            await reply(message)

    return send


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _refusal(status: int, headers: Headers) -> ChameleonError | None:
    """What the proxy means by an answer of its own; None where a router wrote it."""
    if headers.get("content-type", "").startswith("application/json"):
        return None
    if status == 429:
        wait = headers.get("retry-after", "1")
        return OverloadedError("The service is full; retry in a moment.", retry_after=float(wait))
    if status == 503:
        return UnavailableError("A part of the service is restarting; retry in a moment.")
    if status == 408:
        return DeadlineError("The answer was not complete within its time; allow it more.")
    return None
