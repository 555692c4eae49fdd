from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from transformers import PreTrainedTokenizerFast

MODEL = "tiny/bytes"


async def complete(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.completions.create(**({"model": MODEL, "prompt": "xxx"} | fields))


async def test_a_completion_through_the_official_client(client: AsyncOpenAI, worker: Any) -> None:
    answer = await complete(client, max_tokens=4)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("abcd", "length", None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)
    assert worker.open == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_prompt_tokens_count_once_for_each_prompt(
    client: AsyncOpenAI, worker: Any, stream: bool
) -> None:
    worker.cached_tokens = 2
    fields: dict[str, Any] = {"prompt": ["xxx", "yyyy"], "n": 3, "max_tokens": 4}
    if stream:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        usage = [event async for event in await complete(client, **fields, **options)][-1].usage
    else:
        usage = (await complete(client, **fields)).usage
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (7, 4)


async def test_every_answer_says_what_adapted_it(client: AsyncOpenAI) -> None:
    answer = await complete(client, max_tokens=1)
    assert answer.adaptation["mode"] == "cluster"
    assert answer.adaptation["cluster"] == 3
    assert answer.adaptation["similarity"] == pytest.approx(1.0)
    assert len(answer.adaptation["adapter_key"]) == 16
    assert answer.adaptation["snapshot_version"] == 5


@pytest.mark.parametrize(
    ("adaptation", "mode", "cluster"),
    [("auto", "cluster", 3), ("off", "off", None), (8, "cluster", 8)],
)
async def test_the_caller_chooses_the_adaptation(
    client: AsyncOpenAI, adaptation: Any, mode: str, cluster: int | None
) -> None:
    answer = await complete(client, extra_body={"adaptation": adaptation})
    assert (answer.adaptation["mode"], answer.adaptation["cluster"]) == (mode, cluster)


async def test_a_prompt_that_resembles_no_cluster_runs_static(client: AsyncOpenAI) -> None:
    answer = await complete(client, prompt="A stranger in town")
    assert answer.adaptation["mode"] == "static"
    assert answer.adaptation["similarity"] < 0.9


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_answered_in_order_each_with_its_adaptation(
    client: AsyncOpenAI, stream: bool
) -> None:
    fields = {"prompt": ["xx", "yyy"], "n": 2, "max_tokens": 2, "seed": 1}
    if stream:
        events = [event async for event in await complete(client, **fields, stream=True)]
        texts = dict.fromkeys(range(4), "")
        clusters = {}
        for event in events:
            [choice] = event.choices
            texts[choice.index] += choice.text
            clusters[choice.index] = choice.adaptation["cluster"]
            assert event.adaptation == choice.adaptation
    else:
        answer = await complete(client, **fields)
        assert answer.usage.prompt_tokens == 5
        assert answer.usage.completion_tokens == 8
        texts = {choice.index: choice.text for choice in answer.choices}
        clusters = {choice.index: choice.adaptation["cluster"] for choice in answer.choices}
    # Sample i of a seeded request has the seed plus i, whatever its prompt.
    assert texts == {0: "bc", 1: "cd", 2: "bc", 3: "cd"}
    assert clusters == {0: 3, 1: 3, 2: 8, 3: 8}


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("xy", [["x", "y"]]), (["x", "y"], [["x"], ["y"]]), ([87, 88], None), ([[87], [88]], None)],
)
async def test_every_form_of_prompt(
    client: AsyncOpenAI, worker: Any, tokenizer: PreTrainedTokenizerFast, prompt: Any, tokens: Any
) -> None:
    await complete(client, prompt=prompt)
    sent = [list(request.prompt_tokens) for request in worker.requests]
    if tokens is None:
        assert sent == (prompt if isinstance(prompt[0], list) else [prompt])
    else:
        assert [tokenizer.convert_ids_to_tokens(ids) for ids in sent] == tokens


async def test_every_parameter_reaches_the_worker(client: AsyncOpenAI, worker: Any) -> None:
    await complete(
        client,
        max_tokens=9,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"7": 3, "8": -100},
        stop=["one", "two"],
        seed=11,
        logprobs=3,
        user="someone",
        best_of=1,
        suffix="",
        extra_body={
            "top_k": 1000,
            "min_p": 0.1,
            "repetition_penalty": 1.25,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [4, 5],
            "timeout_s": 2.5,
        },
    )
    [request] = worker.requests
    assert request.timeout_s == 2.5
    assert request.sampling.model_dump() == {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 256,  # clamped to the vocabulary
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {7: 3, 8: -100},
        "stop": ("one", "two"),
        "stop_token_ids": (4, 5),
        "ignore_eos": True,
        "seed": 11,
        "logprobs": 3,
        "prompt_logprobs": None,
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_only_what_streams_may_be_seen_before_it_is_complete(
    client: AsyncOpenAI, worker: Any, stream: bool
) -> None:
    answer = await complete(client, n=2, stream=stream)
    if stream:
        assert [event async for event in answer]
    assert [request.whole for request in worker.requests] == [not stream] * 2


async def test_null_means_the_default(http: httpx.AsyncClient, worker: Any) -> None:
    names = (
        "max_tokens temperature top_p stop n seed echo logprobs best_of suffix stream user "
        "logit_bias stream_options top_k adaptation presence_penalty stop_token_ids timeout_s"
    )
    body = {"model": MODEL, "prompt": "x"} | dict.fromkeys(names.split())
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert worker.requests[0].sampling.max_tokens == 16
    assert worker.requests[0].sampling.temperature == 1.0
    assert worker.requests[0].timeout_s is None


@pytest.mark.parametrize(("seed", "sent"), [(-1, 2**63 - 1), (2**63, 0), (10**30, 10**30 % 2**63)])
async def test_any_seed_fits_the_engine(
    client: AsyncOpenAI, worker: Any, seed: int, sent: int
) -> None:
    await complete(client, seed=seed)
    assert worker.requests[0].sampling.seed == sent


async def test_samples_without_a_seed_stay_without(client: AsyncOpenAI, worker: Any) -> None:
    await complete(client, n=3)
    assert [request.sampling.seed for request in worker.requests] == [None] * 3
    assert len({request.request_id for request in worker.requests}) == 3


@pytest.mark.parametrize("prompt", ["xyz", [87, 88, 89], [[87, 88, 89]]])
async def test_echo_without_logprobs(
    client: AsyncOpenAI, tokenizer: PreTrainedTokenizerFast, prompt: Any
) -> None:
    answer = await complete(client, prompt=prompt, echo=True, max_tokens=2)
    text = "xyz" if prompt == "xyz" else tokenizer.decode([87, 88, 89])
    assert answer.choices[0].text == text + "ab"


async def test_the_echo_of_tokens_keeps_characters_that_span_several(
    client: AsyncOpenAI, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = tokenizer.encode("a€")
    answer = await complete(client, prompt=tokens, echo=True, max_tokens=0, logprobs=0)
    assert answer.choices[0].text == "a€"
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert logprobs.text_offset == [0, 1, 1, 1]


async def test_the_echo_without_logprobs_keeps_them_too(
    client: AsyncOpenAI, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "naïve 🙂 日本語"
    answer = await complete(client, prompt=tokenizer.encode(text), echo=True, max_tokens=1)
    assert answer.choices[0].text == text + "a"


async def test_a_temperature_near_zero_is_greedy(client: AsyncOpenAI, worker: Any) -> None:
    for temperature in (1e-50, 1e-7, 1e-5):
        await complete(client, temperature=temperature)
    assert [request.sampling.temperature for request in worker.requests] == [0, 0, 1e-5]


async def test_the_caller_who_leaves_out_echo_may_not_ask_for_no_tokens(
    http: httpx.AsyncClient,
) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 0}
    answer = await http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"


async def test_streamed_and_whole_answers_agree(client: AsyncOpenAI) -> None:
    fields = {"prompt": "xy€", "echo": True, "logprobs": 2, "max_tokens": 3, "seed": 2}
    whole = (await complete(client, **fields)).choices[0]
    text, logprobs = "", {}
    async for event in await complete(client, **fields, stream=True):
        [choice] = event.choices
        text += choice.text
        for name, values in choice.logprobs.model_dump().items():
            logprobs.setdefault(name, []).extend(values)
    assert text == whole.text == "xy€cde"
    assert logprobs == whole.logprobs.model_dump()
    assert choice.finish_reason == "length"


def test_a_logprob_of_minus_infinity_can_be_sent() -> None:
    from cluster_router.openai.logprobs import LegacyLogprobs
    from cluster_router.wire.types import TokenLogprob

    entry = TokenLogprob(1, "a", b"a", float("-inf"), (TokenLogprob(2, "b", b"b", -0.1),))
    taken = LegacyLogprobs().take([entry])
    assert taken["token_logprobs"] == [-9999.0]
    assert taken["top_logprobs"] == [{"a": -9999.0, "b": -0.1}]


def test_of_alternatives_with_one_text_the_likeliest_counts() -> None:
    from cluster_router.openai.logprobs import LegacyLogprobs
    from cluster_router.wire.types import TokenLogprob

    top = (TokenLogprob(2, "b", b"b", -1.0), TokenLogprob(3, "b", b"b", -2.0))
    entry = TokenLogprob(3, "b", b"b", -2.0, top)
    assert LegacyLogprobs().take([entry])["top_logprobs"] == [{"b": -1.0}]


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_scoring_as_lm_eval_does_it(http: httpx.AsyncClient, max_tokens: int) -> None:
    """The request and the parsing of lm-eval's `local-completions`, on two requests."""
    prompts, context_lengths = [[87, 88, 89], [88, 88, 88, 91]], [1, 2]
    body = {
        "model": MODEL,
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = (await http.post("/v1/completions", json=body)).json()["choices"]
    for choice, prompt, start in zip(choices, prompts, context_lengths, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + max_tokens
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        end = len(prompt)
        scored = logprobs["token_logprobs"][start:end]
        tops = logprobs["top_logprobs"][start:end]
        assert scored == [-0.5] * (len(prompt) - start)
        assert all(value == max(top.values()) for value, top in zip(scored, tops, strict=True))
