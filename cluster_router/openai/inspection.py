"""Endpoints beyond OpenAI's: the clusters, their adapters, and how a prompt is assigned."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field

from cluster_router.openai.answers import describe
from cluster_router.openai.body import StrictRoute
from cluster_router.openai.chat import ChatMessage
from cluster_router.openai.common import NAMESPACE, AdaptationChoice, Strict
from cluster_router.openai.completions import Prompts
from cluster_router.openai.convert import as_messages, as_prompt, check_model
from cluster_router.openai.guard import tenant_of
from cluster_router.openai.schema import AssignmentView, ClusterList, ClusterView
from cluster_router.openai.service import ServiceSource
from cluster_router.wire.errors import RequestError
from cluster_router.wire.forms import ExportForm
from cluster_router.wire.types import (
    DEFAULT_NAMESPACE,
    ClusterInfo,
    GenerateRequest,
    Namespace,
    SamplingParams,
)

ClusterId = Annotated[int, Path(ge=0, lt=2**63, description="The cluster's stable id.")]
Form = Annotated[
    ExportForm,
    Query(
        description="What the reader can take: `whole` needs `lora_bias`, as PEFT has; `plain` is "
        "LoRA alone, for vLLM, and lacks the shift of the head; `linears` lacks all of the head."
    ),
]
Tenant = Annotated[Namespace, Query(description=NAMESPACE)]


class AssignRequest(Strict):
    """Exactly one of `prompt` (one text or one list of token ids) and `messages`."""

    prompt: Prompts | None = None
    messages: list[ChatMessage] | None = None
    adaptation: AdaptationChoice | None = None
    namespace: Namespace | None = Field(None, description=NAMESPACE)
    model: str | None = None


def inspection_routes(service: ServiceSource) -> APIRouter:
    """Clusters and assignments over `service`."""
    router = APIRouter(prefix="/v1", tags=["clusters"], route_class=StrictRoute)

    @router.get("/clusters", response_model=ClusterList, summary="List the clusters")
    async def list_clusters(request: Request, namespace: Tenant = DEFAULT_NAMESPACE) -> Any:
        source, namespace = service(), tenant_of(request, namespace)
        snapshot, clusters = await source.table(namespace)
        data = [_view(cluster) for cluster in clusters]
        return {"object": "list", "snapshot_version": snapshot.version, "data": data}

    @router.get("/clusters/{cluster}", response_model=ClusterView, summary="Describe a cluster")
    async def get_cluster(
        request: Request, cluster: ClusterId, namespace: Tenant = DEFAULT_NAMESPACE
    ) -> Any:
        return _view(await service().cluster(cluster, tenant_of(request, namespace)))

    @router.get(
        "/clusters/{cluster}/adapter",
        response_class=Response,
        responses={
            200: {
                "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}}
            }
        },
        summary="Download a cluster's adapter in PEFT's format",
    )
    async def get_adapter(
        request: Request,
        cluster: ClusterId,
        namespace: Tenant = DEFAULT_NAMESPACE,
        form: Form = "whole",
    ) -> Response:
        source, namespace = service(), tenant_of(request, namespace)
        archive = await source.export(cluster, namespace, form)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.model.name).strip("-.")
        name = f"{stem}-cluster-{cluster}.zip"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(archive, media_type="application/zip", headers=headers)

    @router.post("/assign", response_model=AssignmentView, summary="Assign a prompt to a cluster")
    async def assign(request: Request, body: AssignRequest) -> Any:
        source = service()
        if body.model is not None:
            check_model(source, body.model)
        prepared = await source.prepare(_assignable(body, tenant_of(request, body.namespace)))
        return {
            "object": "assignment",
            "model": source.model.name,
            "adaptation": describe(prepared.assignment),
            "prompt_tokens": len(prepared.prompt_tokens),
        }

    return router


def _view(cluster: ClusterInfo) -> dict[str, Any]:
    return {"object": "cluster", **asdict(cluster)}


def _assignable(body: AssignRequest, namespace: str) -> GenerateRequest:
    if (body.prompt is None) == (not body.messages):
        raise RequestError("Send exactly one of prompt and messages.", "prompt")
    if body.prompt is not None and len(body.prompt) != 1:
        raise RequestError("Send one prompt at a time to be assigned.", "prompt")
    prompt = as_messages(body.messages) if body.messages else (body.prompt or ("",))[0]
    return GenerateRequest(
        **as_prompt(prompt),
        sampling=SamplingParams(max_tokens=0),
        adaptation="auto" if body.adaptation is None else body.adaptation,
        namespace=namespace,
        learn=False,
    )
