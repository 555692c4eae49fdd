"""OpenAI's own endpoints: models, completions, chat."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from cluster_router.openai.answers import Answer
from cluster_router.openai.body import StrictRoute
from cluster_router.openai.chat import ChatRequest
from cluster_router.openai.common import SamplingFields
from cluster_router.openai.completions import CompletionRequest
from cluster_router.openai.convert import check_model, prepare_chat, prepare_completion
from cluster_router.openai.guard import tenant_of
from cluster_router.openai.request_id import request_id_of
from cluster_router.openai.schema import ChatCompletion, Completion, ModelInfo, ModelList
from cluster_router.openai.service import ServiceSource
from cluster_router.openai.sse import EventStream, first_of
from cluster_router.openai.streams import Indexed, merge, until_disconnect

Body = TypeVar("Body", bound=SamplingFields)

_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


def openai_routes(service: ServiceSource, chat_max_tokens: int | None) -> APIRouter:
    """Models, completions and chat over `service`."""
    router = APIRouter(prefix="/v1", tags=["openai"], route_class=StrictRoute)

    @router.get("/models", response_model=ModelList, summary="List the served model")
    async def list_models() -> Any:
        return {"object": "list", "data": [_model(service)]}

    @router.get("/models/{model:path}", response_model=ModelInfo, summary="Describe a model")
    async def get_model(model: str) -> Any:
        check_model(service(), model)
        return _model(service)

    @router.post(
        "/completions",
        response_model=None,
        responses={200: {"model": Completion, "content": _EVENTS}},
        summary="Continue or score text",
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        answer = await prepare_completion(service(), _of_tenant(body, request))
        return await _respond(service, answer, body, request)

    @router.post(
        "/chat/completions",
        response_model=None,
        responses={200: {"model": ChatCompletion, "content": _EVENTS}},
        summary="Answer a conversation",
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        answer = await prepare_chat(service(), _of_tenant(body, request), chat_max_tokens)
        return await _respond(service, answer, body, request)

    return router


def _of_tenant(body: Body, request: Request) -> Body:
    """`body` in the namespace that its sender speaks for."""
    return body.model_copy(update={"namespace": tenant_of(request, body.namespace)})


def _model(service: ServiceSource) -> dict[str, Any]:
    model = service().model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "chameleon",
        "context_length": model.context_length,
    }


async def _respond(
    service: ServiceSource, answer: Answer, body: SamplingFields, request: Request
) -> Response:
    router = service()
    requests = [replace(choice.request, whole=not body.stream) for choice in answer.choices]
    chunks = merge([router.run(request) for request in requests])
    if not body.stream:
        whole = await until_disconnect(request, _whole(answer, chunks))
        return JSONResponse(whole)
    first = await until_disconnect(request, first_of(chunks))
    request_id = request_id_of(request.scope)
    return EventStream(answer, first, chunks, body.stream_options, request_id)


async def _whole(answer: Answer, chunks: AsyncGenerator[Indexed, None]) -> dict[str, Any]:
    return answer.whole([item async for item in chunks])
