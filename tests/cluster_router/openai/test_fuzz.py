"""Whatever the body is, a caller's fault is a 4xx and never a 5xx."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reliability.inputs import FIELDS, GOOD

MODEL = "tiny/bytes"

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
plausible = st.sampled_from(
    [
        0,
        1,
        2,
        20,
        300,
        -1,
        0.5,
        True,
        False,
        "auto",
        "off",
        "text",
        "user",
        "x",
        ["x"],
        [1, 2],
        [[1]],
    ]
)
fields = st.sampled_from(FIELDS)
bodies = st.dictionaries(fields | st.text(max_size=6), plausible | values, max_size=5)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "type"]), plausible | values),
    max_size=3,
)
PATHS = {path: body | ({"model": MODEL} if "model" in body else {}) for path, body in GOOD.items()}
FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def post(app: FastAPI, path: str, content: str | bytes) -> httpx.Response:
    async def call() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            headers = {"Content-Type": "application/json"}
            return await http.post(path, content=content, headers=headers)

    return asyncio.run(call())


def check(answer: httpx.Response) -> None:
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
    assert "internal_error" not in answer.text


@pytest.mark.parametrize("path", PATHS)
@FUZZ
@given(changes=bodies)
def test_a_good_body_with_arbitrary_fields(
    app: FastAPI, path: str, changes: dict[str, Any]
) -> None:
    check(post(app, path, json.dumps(PATHS[path] | changes)))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/assign"])
@FUZZ
@given(turns=messages)
def test_arbitrary_messages(app: FastAPI, path: str, turns: list[Any]) -> None:
    body = {"messages": turns} if path == "/v1/assign" else PATHS[path] | {"messages": turns}
    check(post(app, path, json.dumps(body)))


@pytest.mark.parametrize("path", PATHS)
@FUZZ
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_arbitrary_bytes(app: FastAPI, path: str, content: str | bytes) -> None:
    check(post(app, path, content))
