"""Names every request, and answers for failures that nothing else answers for."""

from __future__ import annotations

import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster_router.openai.errors import error_answer

HEADER = "x-request-id"
CLIENT_GONE = 499
"""Status in the access log for a caller who left; nobody receives it."""

_KEY = "chameleon_request_id"
_UNSAFE = re.compile(r"[^A-Za-z0-9._:-]+")


def request_id_of(scope: Scope) -> str:
    """The id of the request in `scope`."""
    return str(scope[_KEY])


class RequestIds:
    """ASGI middleware: takes or makes a request id, returns it, and turns exceptions into answers.

    A caller's id is used as far as it is safe to log and to send back.

    Args:
        app: what is wrapped.
        returned: whether to return the id; not where a proxy in front does.
    """

    def __init__(self, app: ASGIApp, returned: bool = True) -> None:
        self._app = app
        self._returned = returned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = _UNSAFE.sub("", Headers(scope=scope).get(HEADER, ""))[:128]
        request_id = given or uuid4().hex
        scope[_KEY] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._returned:
                    MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            if not started:
                await Response(status_code=CLIENT_GONE)(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            response = error_answer(error, request_id).response()
            await response(scope, receive, send_with_id)
