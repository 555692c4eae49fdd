"""Reading request bodies more strictly than the JSON module does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from cluster_router.wire.errors import RequestError

_JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json\s*(;.*)?", re.IGNORECASE)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictRoute(APIRoute):
    """A route that checks its JSON body before FastAPI does: every fault has one answer."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def handle(request: Request) -> Response:
            parsed = parse_object(request.headers.get("content-type", ""), await request.body())
            return await handler(_ParsedRequest(request, parsed))

        return handle


class _ParsedRequest(Request):
    """A request whose body has been read and parsed."""

    def __init__(self, request: Request, parsed: dict[str, Any]) -> None:
        super().__init__(request.scope, request.receive)
        self._body = json.dumps(None).encode()  # Anything: FastAPI only asks whether it is empty.
        self._parsed = parsed

    async def json(self) -> Any:
        return self._parsed


def parse_object(content_type: str, body: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        RequestError: wrong content type, malformed or too deeply nested JSON, text that is not
            Unicode, NaN or Infinity, or anything but an object.
    """
    if not _JSON_TYPE.fullmatch(content_type.strip()):
        raise RequestError("Send the body as JSON, with Content-Type: application/json.")
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise RequestError("The body must be valid UTF-8 without lone surrogates.") from None
    except RecursionError:
        raise RequestError("The body is nested too deeply.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"The body is not valid JSON: {error.msg} at {where}.") from None
    except RequestError:
        raise
    except ValueError:  # The interpreter's limit on the digits of an integer.
        raise RequestError("The body holds a number with too many digits.") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"The body holds {name}, which is not JSON; send a finite number.")
