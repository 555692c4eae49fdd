"""The one place where an exception becomes an HTTP status and an OpenAI error body."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from cluster_router.wire.errors import (
    AuthenticationError,
    ChameleonError,
    OverloadedError,
    RequestError,
    SetupError,
)

logger = logging.getLogger(__name__)

# Ray is known here by class names alone: this package must work, and be tested, without it.
_OVERLOADED = {"BackPressureError"}
_UNAVAILABLE = {
    "ActorDiedError",
    "ActorUnavailableError",
    "DeploymentUnavailableError",
    "NodeDiedError",
    "OwnerDiedError",
    "RayActorError",
    "ReplicaUnavailableError",
    "WorkerCrashedError",
}


class ErrorDetail(TypedDict):
    """OpenAI's description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail


@dataclass(frozen=True)
class ErrorAnswer:
    """Status, OpenAI error fields and headers of one failure."""

    status: int
    message: str
    kind: str = RequestError.kind
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> ErrorBody:
        """The JSON body."""
        detail = ErrorDetail(message=self.message, type=self.kind, param=self.param, code=self.code)
        return ErrorBody(error=detail)

    def response(self) -> JSONResponse:
        """The HTTP answer."""
        return JSONResponse(self.body, self.status, dict(self.headers))


def error_answer(error: BaseException, request_id: str) -> ErrorAnswer:
    """What a caller is told about `error`.

    Errors raised on another machine arrive wrapped; the cause that this project raised decides.
    Anything unexpected is logged under `request_id`, and the caller is told no more than that.
    """
    for cause in _causes(error):
        answer = _known(cause)
        if answer is not None:
            return answer
    logger.error("request %s failed", request_id, exc_info=error)
    message = f"The server failed on this request; its log names request {request_id}."
    return ErrorAnswer(500, message, "server_error", code="internal_error")


def error_code(error: BaseException) -> str:
    """A short name for `error`, from a small set: what answers call it, or what befell its caller.

    Nothing is logged.
    """
    for cause in _causes(error):
        if isinstance(cause, (GeneratorExit, asyncio.CancelledError)):
            return "cancelled"
        answer = _known(cause)
        if answer is not None:
            return answer.code or answer.kind
    return "internal_error"


def _causes(error: BaseException) -> list[BaseException]:
    """`error` and what it wraps, innermost first (Ray's RayTaskError has `.cause`)."""
    chain: list[BaseException] = []
    current: Any = error
    while isinstance(current, BaseException) and current not in chain:
        chain.append(current)
        current = getattr(current, "cause", None)
    return chain[::-1]


def _known(error: BaseException) -> ErrorAnswer | None:
    if isinstance(error, SetupError):
        return None  # It speaks to the operator, of files and settings: it belongs in the log.
    if isinstance(error, ChameleonError):
        return _from_chameleon(error)
    if isinstance(error, RequestValidationError):
        return _from_validation(error.errors())
    if isinstance(error, HTTPException):
        return _from_http(error)
    return _from_ray(error)


def _from_ray(error: BaseException) -> ErrorAnswer | None:
    names = {parent.__name__ for parent in type(error).__mro__}
    if names & _OVERLOADED:
        wait = getattr(error, "retry_after_s", None) or 1.0
        return _from_chameleon(
            OverloadedError("The service is full; retry in a moment.", retry_after=float(wait))
        )
    if names & _UNAVAILABLE:
        message = "A part of the service is restarting; retry in a moment."
        return ErrorAnswer(503, message, "service_unavailable_error", code="unavailable")
    return None


def _from_chameleon(error: ChameleonError) -> ErrorAnswer:
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return ErrorAnswer(error.status, error.message, error.kind, error.param, error.code, headers)


def _from_http(error: HTTPException) -> ErrorAnswer:
    messages = {
        404: "There is no such path; see /docs for those that exist.",
        405: "This path does not take that method.",
    }
    message = messages.get(error.status_code, str(error.detail))
    kind = RequestError.kind if error.status_code < 500 else "server_error"
    return ErrorAnswer(error.status_code, message, kind, headers=error.headers or {})


def _from_validation(errors: Sequence[Mapping[str, Any]]) -> ErrorAnswer:
    unknown = [item for item in errors if item["type"] == "extra_forbidden"]
    if unknown:
        names = ", ".join(param_path(item["loc"]) for item in unknown)
        plural = "s" if len(unknown) > 1 else ""
        message = f"Unrecognized request argument{plural} supplied: {names}"
        return ErrorAnswer(400, message, param=param_path(unknown[0]["loc"]))
    first = errors[0]
    param = param_path(first["loc"]) or None
    if first["type"] == "missing":
        name = f"'{param}'" if param else "a JSON body"
        return ErrorAnswer(400, f"Missing required parameter: {name}.", param=param)
    # A validator of our own raised a whole sentence; pydantic's are fragments.
    own = first.get("ctx", {}).get("error")
    if isinstance(own, ValueError):
        return ErrorAnswer(400, str(own), param=param)
    sentence = first["msg"][:1].lower() + first["msg"][1:]
    return ErrorAnswer(400, f"Invalid value for '{param}': {sentence}.", param=param)


def param_path(loc: Sequence[str | int]) -> str:
    """`("body", "messages", 0, "role")` as `messages[0].role`."""
    path = ""
    for part in loc[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
