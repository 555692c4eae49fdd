from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from transformers import PreTrainedTokenizerFast

from cluster_router.wire.types import AdapterKey

MODEL = "tiny/bytes"
USER = [{"role": "user", "content": "xxx"}]


async def chat(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(**({"model": MODEL, "messages": USER} | fields))


async def test_a_chat_through_the_official_client(client: AsyncOpenAI, worker: Any) -> None:
    answer = await chat(client, max_completion_tokens=3)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "abc")
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    assert answer.usage.prompt_tokens == len("<|user|>xxx<|assistant|>")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3
    assert answer.adaptation["cluster"] == 3
    assert worker.open == 0


async def test_text_parts_are_joined_and_roles_and_names_pass(
    client: AsyncOpenAI, worker: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": "ok"},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    await chat(client, messages=messages, max_tokens=1)
    text = tokenizer.decode(worker.requests[0].prompt_tokens)
    assert text == ("<|system|>Be brief.<|user|>one two<|assistant|>ok<|tool|>42<|assistant|>")


async def test_an_answer_can_be_sent_back_as_it_came(client: AsyncOpenAI) -> None:
    answer = await chat(client, max_tokens=1)
    messages = [*USER, answer.choices[0].message.model_dump(), *USER]
    assert (await chat(client, messages=messages, max_tokens=1)).choices


async def test_samples_have_seeds_of_their_own(client: AsyncOpenAI) -> None:
    answer = await chat(client, n=3, seed=4, max_tokens=2)
    assert [choice.message.content for choice in answer.choices] == ["ef", "fg", "gh"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 6


async def test_logprobs(client: AsyncOpenAI) -> None:
    answer = await chat(client, logprobs=True, top_logprobs=2, max_tokens=1)
    [entry] = answer.choices[0].logprobs.content
    assert (entry.token, entry.logprob, entry.bytes) == ("a", -0.5, [97])
    assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == ("a", -0.5)
    assert len(entry.top_logprobs) == 2


async def test_logprobs_without_alternatives(client: AsyncOpenAI, worker: Any) -> None:
    answer = await chat(client, logprobs=True, max_tokens=1)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert worker.requests[0].sampling.logprobs == 0


async def test_length_left_open_is_what_context_and_config_leave(
    client: AsyncOpenAI, worker: Any
) -> None:
    await chat(client)
    assert worker.requests[0].sampling.max_tokens == 20  # chat_max_tokens of the fixture
    await chat(client, messages=[{"role": "user", "content": "x" * 220}])
    template = len("<|user|><|assistant|>")
    assert worker.requests[1].sampling.max_tokens == 256 - 220 - template


async def test_equal_limits_under_both_names_are_no_contradiction(
    client: AsyncOpenAI, worker: Any
) -> None:
    await chat(client, max_tokens=7, max_completion_tokens=7)
    assert worker.requests[0].sampling.max_tokens == 7


VACUOUS = {
    "metadata": {"team": "a"},
    "safety_identifier": "u1",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "parallel_tool_calls": False,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "store": False,
    "service_tier": "auto",
    "reasoning_effort": "none",
    "verbosity": "medium",
    "modalities": ["text"],
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "logprobs": False,
    "user": "someone",
}


@pytest.mark.parametrize("name", VACUOUS)
async def test_a_field_that_asks_for_nothing_is_accepted(
    http: httpx.AsyncClient, name: str
) -> None:
    body = {"model": MODEL, "messages": USER, "max_tokens": 1, name: VACUOUS[name]}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


REFUSED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "store": True,
    "service_tier": "priority",
    "reasoning_effort": "high",
    "verbosity": "low",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "metadata": {"n": 1},
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_field_that_asks_for_what_is_not_done_is_refused_by_name(
    http: httpx.AsyncClient, worker: Any, name: str
) -> None:
    body = {"model": MODEL, "messages": USER, "max_tokens": 1, name: REFUSED[name]}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].split(".")[0] == name
    assert not worker.requests


async def test_an_answer_says_when_its_update_was_late(client: AsyncOpenAI, worker: Any) -> None:
    worker.stand_in = AdapterKey("base", "hyper", None, 0)
    whole = await chat(client, max_tokens=3)
    told = whole.adaptation
    assert (told["mode"], told["cluster"], told["fallback"]) == ("static", 3, True)
    assert told["adapter_key"] == worker.stand_in.id
    streamed = [event.adaptation async for event in await chat(client, max_tokens=3, stream=True)]
    assert len(streamed) > 2
    assert all(event == told for event in streamed), "from the very first event"
    worker.stand_in = None
    assert (await chat(client, max_tokens=3)).adaptation["fallback"] is False
