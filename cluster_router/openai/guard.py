"""Guard: what is checked of a request before any of it is read."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster_router.access import ANYONE, Access, Caller
from cluster_router.wire.errors import TooLargeError

_KEY = "chameleon_caller"
_OPEN = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
"""Paths that need no key: probes, and the description of the API."""


def caller_of(request: Request) -> Caller:
    """Who sends a request that the guard has let in."""
    caller: Caller = request.scope.get(_KEY, ANYONE)
    return caller


def tenant_of(request: Request, asked: str | None) -> str:
    """The namespace of a request that asks for `asked`.

    Raises:
        ForbiddenError: its key speaks for another one.
    """
    return caller_of(request).tenant(asked)


class Guard:
    """ASGI middleware: keys and rates for all but probes and schema, a bound on every body.

    Args:
        app: what is guarded.
        access: None lets everyone in.
        max_body_bytes: longest body.
        unlocked: more paths that need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access | None,
        max_body_bytes: int,
        unlocked: Collection[str] = (),
    ) -> None:
        self._app = app
        self._access = access
        self._most = max_body_bytes
        self._open = _OPEN.union(unlocked)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if self._access is not None and _route(scope) not in self._open:
                scope[_KEY] = await self._access.admit(headers.get("authorization", ""))
            told = headers.get("content-length", "")
            if told.isascii() and told.isdigit():
                self._check(int(told))
            receive = self._counted(receive)
        await self._app(scope, receive, send)

    def _counted(self, receive: Receive) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                self._check(size)
            return message

        return counted

    def _check(self, size: int) -> None:
        if size > self._most:
            raise TooLargeError(
                f"The body is longer than {self._most:,} bytes, the most this service takes."
            )


def _route(scope: Scope) -> str:
    """The path below the application's own root."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
