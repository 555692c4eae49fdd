"""The HTTP application: routes, request ids, probes and errors, over one service object."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from cluster_router.openai.errors import ErrorBody, error_answer
from cluster_router.openai.inspection import inspection_routes
from cluster_router.openai.request_id import RequestIds, request_id_of
from cluster_router.openai.routes import openai_routes
from cluster_router.openai.service import Readiness, ServiceSource
from cluster_router.wire.errors import UnavailableError

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request has to change, or to wait."},
    "5XX": {"model": ErrorBody, "description": "The service failed or is not ready."},
}


def build_app(
    service: ServiceSource,
    readiness: Readiness,
    chat_max_tokens: int | None = None,
    return_request_id: bool = True,
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
    """
    app = FastAPI(
        title="ChameleonLLM",
        summary="OpenAI-compatible API of a model that adapts to its traffic.",
        responses=_ERRORS,
    )
    app.add_middleware(RequestIds, returned=return_request_id)
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.include_router(openai_routes(service, chat_max_tokens))
    app.include_router(inspection_routes(service))

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
