import re
from typing import Any, NoReturn

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from cluster_router.http import build_app
from cluster_router.openai.errors import error_answer
from cluster_router.wire.errors import (
    ContextLengthError,
    DeltaError,
    EngineError,
    OverloadedError,
    UnavailableError,
)

MODEL = "tiny/bytes"
JSON = {"Content-Type": "application/json"}
PROMPT = {"model": MODEL, "prompt": "x"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}


async def test_the_official_client_raises_its_own_errors(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        await client.completions.create(model=MODEL, prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(NotFoundError) as missing:
        await client.completions.create(model="gpt-9", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(NotFoundError) as cluster:
        await client.completions.create(model=MODEL, prompt="x", extra_body={"adaptation": 10**30})
    assert cluster.value.code == "cluster_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/clusters/77", 404),
        ("GET", "/v1/clusters/77/adapter", 404),
        ("GET", "/v1/clusters/x", 400),
        ("GET", f"/v1/clusters/{10**30}", 400),
    ],
)
async def test_every_error_has_openais_form(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        ("abc-1.2:3_4", "abc-1.2:3_4"),
        ("a b<c>", "abc"),
        ("x" * 500, "x" * 128),
        ("", None),
        ("<>", None),
    ],
)
async def test_request_ids_are_made_safe_and_returned(
    http: httpx.AsyncClient, given: str, returned: str | None
) -> None:
    answer = await http.get("/health", headers={"x-request-id": given})
    echoed = answer.headers["x-request-id"]
    assert echoed == returned if returned else re.fullmatch("[0-9a-f]{32}", echoed)


async def test_streams_return_the_request_id_too(http: httpx.AsyncClient) -> None:
    headers = {"x-request-id": "mine", "Authorization": "Bearer anything"}
    answer = await http.post("/v1/completions", json=PROMPT | {"stream": True}, headers=headers)
    assert answer.headers["x-request-id"] == "mine"


async def test_behind_a_proxy_that_returns_the_request_id_the_app_does_not() -> None:
    app = build_app(no_service, starting, return_request_id=False)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert "x-request-id" not in (await http.get("/health")).headers


async def test_an_unexpected_failure_tells_its_request_id_and_logs_the_rest(
    http: httpx.AsyncClient, worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    worker.refusal = ZeroDivisionError("secret")
    headers = {"x-request-id": "find-me"}
    answer = await http.post("/v1/completions", json=PROMPT, headers=headers)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "find-me" in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] == "find-me"
    assert "find-me" in caplog.text
    assert "secret" in caplog.text


def no_service() -> NoReturn:
    raise UnavailableError("The replica is starting; retry in a moment.")


async def starting() -> str | None:
    return "starting"


class RayTaskError(Exception):
    """As Ray wraps what a remote method raised."""

    def __init__(self, cause: Any) -> None:
        super().__init__("traceback of another machine")
        self.cause = cause


class BackPressureError(Exception):
    """As Ray Serve refuses a request."""

    retry_after_s = 3


class RayActorError(Exception):
    pass


class ActorDiedError(RayActorError):
    pass


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RayTaskError(OverloadedError("full")), 429, "overloaded"),
        (RayTaskError(RayTaskError(ContextLengthError("long"))), 400, "context_length_exceeded"),
        (RayTaskError(ZeroDivisionError("secret")), 500, "internal_error"),
        (BackPressureError("dropped"), 429, "overloaded"),
        (RayTaskError(BackPressureError("dropped")), 429, "overloaded"),
        (ActorDiedError("gone"), 503, "unavailable"),
        (EngineError("lost"), 500, "engine_error"),
        (KeyError("secret"), 500, "internal_error"),
        (DeltaError("update of /secret/path is not finite"), 500, "internal_error"),
    ],
)
async def test_where_an_error_was_raised_does_not_matter(
    http: httpx.AsyncClient, worker: Any, error: Exception, status: int, code: str | None
) -> None:
    worker.refusal = error
    for stream in (False, True):
        answer = await http.post("/v1/completions", json=PROMPT | {"stream": stream})
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code
        assert "secret" not in answer.text
        assert "traceback" not in answer.text
    assert worker.open == 0


def test_a_full_service_says_when_to_come_back() -> None:
    assert error_answer(BackPressureError(), "r").headers == {"Retry-After": "3"}
    assert error_answer(OverloadedError("x", retry_after=0.1), "r").headers == {"Retry-After": "1"}


def test_errors_that_contain_themselves_are_told_apart() -> None:
    error = RayTaskError(None)
    error.cause = error
    assert error_answer(error, "r").status == 500


async def test_a_service_that_is_not_built_yet_is_unavailable() -> None:
    transport = httpx.ASGITransport(build_app(no_service, starting))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 503
        assert (await http.get("/v1/models")).status_code == 503
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/health")).status_code == 200
