"""What is checked before a body is read: keys, tenants, rates and sizes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI, AuthenticationError, PermissionDeniedError

from cluster_router.access import Access, ApiKey, key_hash
from cluster_router.http import build_app

MODEL = "tiny/bytes"
KEYS = (
    ApiKey(name="open", sha256=key_hash("open-key")),
    ApiKey(name="bound", sha256=key_hash("bound-key"), namespace="a"),
    ApiKey(name="rare", sha256=key_hash("rare-key"), requests_per_minute=1),
)
BOUND = {"Authorization": "Bearer bound-key"}
PROMPT = {"model": MODEL, "prompt": "x"}


@pytest.fixture
async def guarded(
    app: FastAPI, stage: SimpleNamespace, worker: Any
) -> AsyncIterator[SimpleNamespace]:
    """The same service behind keys: an HTTP client of it, and the worker."""

    async def ready() -> None:
        return None

    door = build_app(lambda: stage.router, ready, access=Access(lambda: KEYS), max_body_bytes=1000)
    transport = httpx.ASGITransport(door)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield SimpleNamespace(http=http, worker=worker)


def openai(guarded: SimpleNamespace, key: str) -> AsyncOpenAI:
    return AsyncOpenAI(
        base_url="http://test/v1", api_key=key, max_retries=0, http_client=guarded.http
    )


async def test_the_official_client_needs_a_key(guarded: SimpleNamespace) -> None:
    with pytest.raises(AuthenticationError) as caught:
        await openai(guarded, "wrong").completions.create(**PROMPT)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert not guarded.worker.requests
    answer = await openai(guarded, "open-key").completions.create(**PROMPT)
    assert answer.choices[0].text


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/clusters", "/v1/clusters/3/adapter", "/metrics", "//v1/models"]
)
async def test_only_probes_and_schema_are_open(guarded: SimpleNamespace, path: str) -> None:
    assert (await guarded.http.get(path)).status_code == 401
    for free in ("/health", "/ready", "/docs", "/openapi.json"):
        assert (await guarded.http.get(free)).status_code == 200


async def test_without_a_key_no_body_is_read(guarded: SimpleNamespace) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100

    answer = await guarded.http.post("/v1/completions", content=endless())
    assert answer.status_code == 401


async def test_a_bound_key_speaks_for_its_tenant(guarded: SimpleNamespace) -> None:
    http, seen = guarded.http, guarded.worker.observed
    assert (await http.post("/v1/completions", json=PROMPT, headers=BOUND)).status_code == 200
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "namespace": "a"}
    assert (await http.post("/v1/chat/completions", json=chat, headers=BOUND)).status_code == 200
    assert seen == ["a", "a"]
    other = PROMPT | {"namespace": "b"}
    with pytest.raises(PermissionDeniedError, match="speaks for namespace 'a' only"):
        await openai(guarded, "bound-key").completions.create(
            **PROMPT, extra_body={"namespace": "b"}
        )
    for method, path, body in (
        ("POST", "/v1/assign", {"prompt": "x", "namespace": "b"}),
        ("GET", "/v1/clusters?namespace=b", None),
        ("GET", "/v1/clusters/3?namespace=b", None),
        ("GET", "/v1/clusters/3/adapter?namespace=b", None),
    ):
        answer = await http.request(method, path, json=body, headers=BOUND)
        assert (answer.status_code, answer.json()["error"]["param"]) == (403, "namespace")
    free = {"Authorization": "Bearer open-key"}
    assert (await http.post("/v1/completions", json=other, headers=free)).status_code == 200
    assert seen == ["a", "a", "b"]


async def test_a_key_used_up_is_told_when_to_come_back(guarded: SimpleNamespace) -> None:
    rare = {"Authorization": "Bearer rare-key"}
    assert (await guarded.http.get("/v1/models", headers=rare)).status_code == 200
    answer = await guarded.http.get("/v1/models", headers=rare)
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_long_bodies_are_refused_by_what_they_say_and_by_what_comes(
    guarded: SimpleNamespace,
) -> None:
    long = PROMPT | {"user": "x" * 1000}
    headers = BOUND | {"Content-Type": "application/json"}
    said = await guarded.http.post("/v1/completions", json=long, headers=headers)

    async def unsaid() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    came = await guarded.http.post("/v1/completions", content=unsaid(), headers=headers)
    for answer in (said, came):
        assert answer.status_code == 413
        assert "1,000 bytes" in answer.json()["error"]["message"]
    assert not guarded.worker.requests


async def test_the_schema_tells_of_keys(guarded: SimpleNamespace) -> None:
    schema = (await guarded.http.get("/openapi.json")).json()
    assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert schema["paths"]["/v1/completions"]["post"]["security"]
    assert "security" not in schema["paths"]["/health"]["get"]
