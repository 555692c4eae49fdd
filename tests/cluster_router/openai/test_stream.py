import json
from typing import Any

import httpx
import pytest
from openai import APIError, AsyncOpenAI, RateLimitError
from transformers import PreTrainedTokenizerFast

from cluster_router.wire.errors import EngineError, OverloadedError

MODEL = "tiny/bytes"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "xxx"}], "max_tokens": 3}
TEXT = {"model": MODEL, "prompt": "xxx", "max_tokens": 3}


async def events(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[str]:
    async with http.stream("POST", path, json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = (await answer.aread()).decode()
    assert text.endswith("\n\n")
    blocks = text.split("\n\n")[:-1]
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


async def test_a_chat_stream_on_the_wire(http: httpx.AsyncClient) -> None:
    *blocks, done = await events(http, "/v1/chat/completions", CHAT)
    assert done == "[DONE]"
    parsed = [json.loads(block) for block in blocks]
    assert [event["choices"][0]["delta"] for event in parsed] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": "b"},
        {"content": "c"},
    ]
    assert [event["choices"][0]["finish_reason"] for event in parsed] == [None] * 3 + ["length"]
    assert {event["object"] for event in parsed} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"]) for event in parsed}) == 1
    assert all(event["adaptation"]["cluster"] == 3 for event in parsed)
    assert all("usage" not in event for event in parsed)


async def test_a_completion_stream_has_one_event_a_chunk(http: httpx.AsyncClient) -> None:
    blocks = await events(http, "/v1/completions", TEXT)
    texts = [json.loads(block)["choices"][0]["text"] for block in blocks[:-1]]
    assert texts == ["a", "b", "c"]


async def test_usage_comes_last_with_no_choices(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        **CHAT, n=2, stream=True, stream_options={"include_usage": True}
    )
    *body, last = [event async for event in stream]
    assert last.choices == []
    assert last.usage.completion_tokens == 6
    assert last.usage.prompt_tokens == len("<|user|>xxx<|assistant|>")
    assert last.adaptation["cluster"] == 3
    assert all(event.usage is None for event in body)


async def test_usage_can_come_with_every_chunk(client: AsyncOpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.chat.completions.create(**CHAT, stream=True, stream_options=options)
    counts = [event.usage.completion_tokens async for event in stream]
    assert counts == [0, 1, 2, 3, 3]
    alone = {"continuous_usage_stats": True}
    stream = await client.chat.completions.create(**CHAT, stream=True, stream_options=alone)
    assert all(event.usage is None for event in [event async for event in stream])


async def test_choices_interleave_and_each_opens_with_its_role(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(**CHAT, n=2, seed=0, stream=True)
    seen = [(event.choices[0].index, event.choices[0].delta) async for event in stream]
    assert [(index, delta.role) for index, delta in seen[:2]] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    indices = [index for index, _ in seen[2:]]
    assert indices != sorted(indices)
    texts = {k: "".join(delta.content for index, delta in seen if index == k) for k in (0, 1)}
    assert texts == {0: "abc", 1: "bcd"}


async def test_text_of_any_script_survives_and_no_event_holds_a_line_separator(
    http: httpx.AsyncClient,
) -> None:
    body = {**TEXT, "prompt": "é\u2028\x85漢\n\n😀", "echo": True, "max_tokens": 1}
    blocks = await events(http, "/v1/completions", body)
    assert json.loads(blocks[0])["choices"][0]["text"] == "é\u2028\x85漢\n\n😀a"
    assert all(block.isascii() and "\n" not in block for block in blocks)


async def test_a_refusal_before_the_first_token_has_its_own_status(
    client: AsyncOpenAI, worker: Any
) -> None:
    worker.refusal = OverloadedError("The queue is full; retry.", retry_after=2.5)
    for stream in (True, False):
        with pytest.raises(RateLimitError) as caught:
            await client.chat.completions.create(**CHAT, stream=stream)
        assert caught.value.response.headers["retry-after"] == "3"
        assert caught.value.code == "overloaded"
    assert worker.open == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_a_failure_after_the_first_token_is_told_in_band(
    http: httpx.AsyncClient, worker: Any, n: int
) -> None:
    worker.failure = EngineError("The replica was lost; send the request again.")
    *_, last = await events(http, "/v1/chat/completions", CHAT | {"n": n})
    assert json.loads(last)["error"] == {
        "message": "The replica was lost; send the request again.",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert worker.open == 0


async def test_the_official_client_raises_the_error_in_the_stream(
    client: AsyncOpenAI, worker: Any
) -> None:
    worker.failure = EngineError("The replica was lost.")
    stream = await client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(APIError, match="The replica was lost"):
        _ = [event async for event in stream]


async def test_an_unexpected_failure_in_the_stream_tells_no_internals(
    http: httpx.AsyncClient, worker: Any
) -> None:
    worker.failure = ZeroDivisionError("secret")
    *_, last = await events(http, "/v1/completions", TEXT)
    assert "secret" not in last
    assert json.loads(last)["error"]["code"] == "internal_error"


@pytest.mark.parametrize(("reason", "code"), [("abort", "unavailable"), (None, "engine_error")])
async def test_an_answer_without_its_end_is_an_error(
    http: httpx.AsyncClient, worker: Any, reason: str | None, code: str | None
) -> None:
    worker.last_reason = reason
    whole = await http.post("/v1/completions", json=TEXT)
    assert whole.status_code == (503 if code == "unavailable" else 500)
    assert whole.json()["error"]["code"] == code
    *_, last = await events(http, "/v1/completions", TEXT)
    assert json.loads(last)["error"]["code"] == code
    assert worker.open == 0


async def test_when_one_choice_is_refused_the_others_are_closed(
    http: httpx.AsyncClient, worker: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    worker.failure = OverloadedError("full")
    worker.fails_after = 2
    answer = await http.post("/v1/completions", json=TEXT | {"n": 8})
    assert answer.status_code == 429
    assert worker.open == 0
