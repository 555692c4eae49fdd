"""What a caller can get wrong in a body, and the field and sentence that answer each mistake."""

import re
from typing import Any

import httpx
import pytest

MODEL = "tiny/bytes"
JSON = {"Content-Type": "application/json"}
PROMPT = {"model": MODEL, "prompt": "x"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}


def turn(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


BAD_COMPLETIONS = [
    ({"model": None}, "model", "valid string"),
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": []}, "prompt", "no list may be empty"),
    ({"prompt": [[]]}, "prompt", "no list may be empty"),
    ({"prompt": ["a", 1]}, "prompt", "must be a string"),
    ({"prompt": [True]}, "prompt", "must be a string"),
    ({"prompt": [1.0]}, "prompt", "must be a string"),
    ({"prompt": [-1]}, "prompt", "must be a string"),
    ({"prompt": {"a": 1}}, "prompt", "must be a string"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": [256]}, "prompt", "token id 256"),
    ({"prompt": [10**30]}, "prompt", "token id 1000"),
    ({"prompt": ["x"] * 2049}, "prompt", "at most 2048"),
    ({"prompt": ["x"] * 100, "n": 100}, "n", "at most 2048"),
    ({"prompt": "x" * 250}, "max_tokens", "context is 256"),
    ({"prompt": "x" * 300}, None, "context is 256"),
    ({"max_tokens": 10**30}, "max_tokens", "context is 256"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"max_tokens": 5.5}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"best_of": 3}, "best_of", "best_of must equal n"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"echo": "yes"}, "echo", "valid boolean"),
    ({"suffix": "end"}, "suffix", "suffix is not supported"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": -1}, "top_k", "greater than or equal to 0"),
    ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"min_tokens": 17}, "min_tokens", "at most max_tokens, which is 16"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"stop": ""}, "stop", "non-empty string"),
    ({"stop": [""]}, "stop", "non-empty string"),
    ({"stop": [1]}, "stop", "non-empty string"),
    ({"stop": ["s"] * 17}, "stop", "up to 16"),
    ({"stop_token_ids": [256]}, "stop_token_ids", "token id 256"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]", "valid integer"),
    ({"logit_bias": []}, "logit_bias", "an object"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"256": 1}}, "logit_bias", "token id 256"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"1": None}}, "logit_bias", "from -100 to 100"),
    ({"adaptation": "on"}, "adaptation", "'auto', 'off'"),
    ({"adaptation": True}, "adaptation", "'auto', 'off'"),
    ({"adaptation": -1}, "adaptation", "'auto', 'off'"),
    ({"adaptation": []}, "adaptation", "'auto', 'off'"),
    ({"namespace": "n" * 129}, "namespace", "at most 128 printable characters"),
    ({"namespace": "a\nb"}, "namespace", "at most 128 printable characters"),
    ({"namespace": 7}, "namespace", "valid string"),
    ({"timeout_s": 5e-324}, "timeout_s", "greater than or equal to 0.001"),
    ({"timeout_s": 86401}, "timeout_s", "less than or equal to 86400"),
    ({"timeout_s": "1"}, "timeout_s", "valid number"),
    ({"learn": "no"}, "learn", "valid boolean"),
    ({"learn": 0}, "learn", "valid boolean"),
    ({"stream": 1}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"stream": True, "stream_options": 1}, "stream_options", "object"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "must be false",
    ),
    ({"tempratur": 1}, "tempratur", "Unrecognized request argument supplied: tempratur"),
    ({"aa": 1, "bb": 1}, "aa", "Unrecognized request arguments supplied: aa, bb"),
]
BAD_CHATS = [
    ({"messages": None}, "messages", "list"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": ["hi"]}, "messages[0]", "object"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing required parameter"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'system'"),
    ({"messages": [{"role": "user", "content": "x", "z": 1}]}, "messages[0].z", "Unrecognized"),
    (turn(None), "messages[0].content", "must be a string"),
    (turn([]), "messages[0].content", "must be a string"),
    (turn(["x"]), "messages[0].content", "must look like"),
    (turn([{"type": "text"}]), "messages[0].content", "exactly"),
    (turn([{"type": "text", "text": 1}]), "messages[0].content", "both are strings"),
    (turn([{"type": "image_url", "image_url": {}}]), "messages[0].content", "'image_url' are not"),
    (turn([{"type": "input_audio"}]), "messages[0].content", "not supported"),
    (turn(""), "messages", "no text"),
    (turn("x" * 300), "messages", "context is 256"),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "Tool calls are not supported",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "refusal": "no"}]},
        "messages[0].refusal",
        "refusal",
    ),
    ({"namespace": "\u200b"}, "namespace", "at most 128 printable characters"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_completion_tokens": 300}, "max_tokens", "context is 256"),
    ({"min_tokens": 21}, "min_tokens", "at most max_tokens, which is 20"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
    ({"logprobs": 1}, "logprobs", "valid boolean"),
    ({"prompt": "x"}, "prompt", "Unrecognized request argument supplied: prompt"),
    ({"echo": True}, "echo", "Unrecognized"),
]


async def refused(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str | None, part: str
) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert part in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(("change", "param", "part"), BAD_COMPLETIONS)
async def test_bad_completions_are_refused_by_name(
    http: httpx.AsyncClient, worker: Any, change: dict[str, Any], param: str | None, part: str
) -> None:
    await refused(http, "/v1/completions", PROMPT | change, param, part)
    assert not worker.requests


@pytest.mark.parametrize(("change", "param", "part"), BAD_CHATS)
async def test_bad_chats_are_refused_by_name(
    http: httpx.AsyncClient, worker: Any, change: dict[str, Any], param: str | None, part: str
) -> None:
    await refused(http, "/v1/chat/completions", CHAT | change, param, part)
    assert not worker.requests


@pytest.mark.parametrize("name", ["model", "prompt"])
async def test_a_missing_field_is_named(http: httpx.AsyncClient, name: str) -> None:
    body = {key: value for key, value in PROMPT.items() if key != name}
    await refused(http, "/v1/completions", body, name, f"Missing required parameter: '{name}'")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON: .* at line 1, column 2"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"temperature": NaN}', "holds NaN"),
        (b'{"temperature": -Infinity}', "holds -Infinity"),
        (b'{"model": "tiny/bytes", "prompt": "x", "temperature": 1e999}', "finite number"),
        (b'{"model": "\xff"}', "valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "lone surrogates"),
        (b'{"\\udc00": 1}', "lone surrogates"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"model": "tiny/bytes", "prompt": ' + b"[" * 400 + b"]" * 400 + b"}", "prompt must be"),
    ],
)
async def test_bodies_that_are_not_json(http: httpx.AsyncClient, content: bytes, part: str) -> None:
    answer = await http.post("/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert re.search(part, answer.json()["error"]["message"])


@pytest.mark.parametrize("escape", [r"\ud83d\ude00", r"\u0000", r"\\ud800"])
async def test_whole_surrogate_pairs_and_other_escapes_are_text(
    http: httpx.AsyncClient, worker: Any, escape: str
) -> None:
    content = b'{"model": "tiny/bytes", "prompt": "%s"}' % escape.encode()
    answer = await http.post("/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("Application/JSON", 200),
        ("application/vnd.api+json", 200),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("", 400),
        ("application/jsonp", 400),
    ],
)
async def test_the_body_must_be_declared_as_json(
    http: httpx.AsyncClient, kind: str, status: int
) -> None:
    content = b'{"model": "tiny/bytes", "prompt": "x"}'
    answer = await http.post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status
    if status == 400:
        assert "application/json" in answer.json()["error"]["message"]
