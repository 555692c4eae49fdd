"""The HTTP application: routes, request ids, probes and errors, over one service object."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from cluster_router.access import Access
from cluster_router.console.routes import ASSETS, ConsoleState, console_routes
from cluster_router.openai.errors import ErrorBody, error_answer
from cluster_router.openai.guard import Guard
from cluster_router.openai.inspection import inspection_routes
from cluster_router.openai.request_id import RequestIds, request_id_of
from cluster_router.openai.routes import openai_routes
from cluster_router.openai.service import Readiness, ServiceSource
from cluster_router.wire.errors import UnavailableError

MAX_BODY_BYTES = 2**22

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request has to change, or to wait."},
    "5XX": {"model": ErrorBody, "description": "The service failed or is not ready."},
}


def build_app(
    service: ServiceSource,
    readiness: Readiness,
    chat_max_tokens: int | None = None,
    return_request_id: bool = True,
    access: Access | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    console: ConsoleState | None = None,
) -> FastAPI:
    """The OpenAI-compatible API.

    Build it where it runs: FastAPI's routers hold locks, so an app cannot be pickled. Under Ray
    Serve that is a deployment's `__serve_build_asgi_app__`, with `@serve.ingress()` above it.

    Args:
        service: gives the service; called for every request, and may raise UnavailableError.
        readiness: None when requests can be served, otherwise the reason why not.
        chat_max_tokens: most tokens of a chat answer whose request names no limit. None leaves it
            the rest of the context.
        return_request_id: whether answers carry `x-request-id`. Ray Serve's proxy adds that header
            itself, so turn it off there.
        access: lets callers in by their API keys, but for probes and schema; None lets everyone in.
        max_body_bytes: longest body that is read.
        console: what the page at `/` shows; None serves no page.
    """
    app = FastAPI(
        redoc_url=None,
        title="ChameleonLLM",
        summary="OpenAI-compatible API of a model that adapts to its traffic.",
        responses=_ERRORS,
    )
    app.add_middleware(
        Guard,
        access=access,
        max_body_bytes=max_body_bytes,
        unlocked=() if console is None else ASSETS,
    )
    app.add_middleware(RequestIds, returned=return_request_id)  # the outer one: it answers errors
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    # Checked by the guard, before a body is read; here for the schema and /docs alone.
    bearer = [] if access is None else [Security(HTTPBearer(auto_error=False))]
    app.include_router(openai_routes(service, chat_max_tokens), dependencies=bearer)
    app.include_router(inspection_routes(service), dependencies=bearer)
    if console is not None:
        app.include_router(console_routes(service, console), dependencies=bearer)

    @app.get("/health", tags=["probes"], response_class=PlainTextResponse, summary="Is it alive")
    async def health() -> str:
        return "ok"

    @app.get("/ready", tags=["probes"], response_class=PlainTextResponse, summary="Can it serve")
    async def ready() -> str:
        reason = await readiness()
        if reason is not None:
            raise UnavailableError(f"Not ready: {reason}")
        return "ready"

    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_answer(error, request_id_of(request.scope)).response()
