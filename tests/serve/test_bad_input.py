"""Whatever comes in, the answer is clear and the service goes on."""

from __future__ import annotations

import httpx
import pytest

pytestmark = pytest.mark.serve

COMPLETION = {"model": "smollm2-135m-instruct", "prompt": "Hello", "max_tokens": 2}
CHAT = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 2,
}
CASES = {
    "malformed JSON": ("completions", b'{"prompt": ', 400, "JSON"),
    "invalid UTF-8": ("completions", b'{"prompt": "\xff\xfe"}', 400, "UTF-8"),
    "not an object": ("chat/completions", b"[1, 2]", 400, "object"),
    "NaN": ("completions", b'{"prompt": "x", "temperature": NaN}', 400, "NaN"),
    "no model": ("completions", {"prompt": "Hello"}, 400, "model"),
    "unknown model": ("completions", {**COMPLETION, "model": "gpt-4"}, 404, "gpt-4"),
    "empty prompt": ("completions", {**COMPLETION, "prompt": ""}, 400, "prompt"),
    "no messages": ("chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    "over-long prompt": ("completions", {**COMPLETION, "prompt": "word " * 4000}, 400, "2048"),
    "over-long output": ("completions", {**COMPLETION, "max_tokens": 5000}, 400, "2048"),
    "cold": ("completions", {**COMPLETION, "temperature": -1}, 400, "temperature"),
    "unknown field": ("completions", {**COMPLETION, "colour": "red"}, 400, "colour"),
    "unknown cluster": ("completions", {**COMPLETION, "adaptation": 99999}, 404, "99999"),
    "unknown mode": ("completions", {**COMPLETION, "adaptation": "loud"}, 400, "adaptation"),
    "token out of range": ("completions", {**COMPLETION, "prompt": [10**6]}, 400, "1000000"),
    "surrogate": (
        "completions",
        b'{"model": "smollm2-135m-instruct", "prompt": "\\ud800"}',
        400,
        "surrogate",
    ),
    "image": (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "image_url",
    ),
    "tools": ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools"),
    "streamed": (
        "completions",
        {**COMPLETION, "temperature": -1, "stream": True},
        400,
        "temperature",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_clearly(service, name: str) -> None:
    path, body, status, word = CASES[name]
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{service.url}/v1/{path}", headers=headers, timeout=30, **content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"] + str(error["param"])
    assert error["type"] == "invalid_request_error"


def test_an_answer_that_cannot_be_in_time_says_so(service) -> None:
    body = COMPLETION | {"timeout_s": 0.001}
    answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 504, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert error["param"] == "timeout_s" and "0.001 s" in error["message"]


def test_unknown_paths_and_methods(service) -> None:
    assert httpx.get(f"{service.url}/v1/nothing").json()["error"]["code"] is None
    assert httpx.get(f"{service.url}/v1/completions").status_code == 405


def test_the_service_goes_on(service) -> None:
    answer = httpx.post(f"{service.url}/v1/completions", json=COMPLETION, timeout=60)
    assert answer.status_code == 200
    assert httpx.get(f"{service.url}/health").text == "ok"
