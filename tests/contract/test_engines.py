"""What every engine behind an LMWorker has to do alike, in float32."""

from __future__ import annotations

import asyncio

import pytest
import torch

from cluster_router.wire.errors import (
    ChameleonError,
    ContextLengthError,
    OverloadedError,
    RequestError,
)
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    SamplingParams,
    TokenChunk,
    TokenizedRequest,
)
from lm_workers.worker import LMWorker

PROMPTS = [(5, 6, 7), (20, 30, 40, 50, 60, 70), (9,), tuple(range(10, 50)), (200, 3, 200, 3)]
UPDATES: list[int | str | None] = ["off", None, 1, 2, 3]
"""More clusters than there is room for."""


def request(
    name: str, prompt: tuple[int, ...] = (5, 6, 7), cluster: int | str | None = "off", **params
) -> TokenizedRequest:
    sampling = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, **params}
    assigned = None
    if not isinstance(cluster, str):
        assigned = AdapterKey("base", "hyper", cluster, 0)
    return TokenizedRequest(
        name, prompt, SamplingParams.model_validate(sampling), Assignment(key=assigned)
    )


async def chunks(worker: LMWorker, one: TokenizedRequest) -> list[TokenChunk]:
    return [chunk async for chunk in worker.generate(one)]


async def tokens(worker: LMWorker, one: TokenizedRequest) -> tuple[int, ...]:
    return tuple(token for chunk in await chunks(worker, one) for token in chunk.tokens)


async def text(worker: LMWorker, one: TokenizedRequest) -> str:
    return "".join(chunk.text for chunk in await chunks(worker, one))


async def at_rest(worker: LMWorker) -> None:
    """Nothing runs, and nothing is lost or held twice."""
    stats = await worker.check_integrity()
    assert (stats.running, stats.waiting, stats.tokens_ahead, stats.kv_free) == (0, 0, 0, 1)


async def test_greedy_answers_are_those_of_transformers(worker: LMWorker, judge) -> None:
    asked = [(prompt, cluster) for prompt in PROMPTS for cluster in UPDATES]
    found: list[tuple[int, ...]] = []
    for start in range(0, len(asked), 8):
        some = [request(f"g{start + i}", *one) for i, one in enumerate(asked[start : start + 8])]
        found += await asyncio.gather(*(tokens(worker, one) for one in some))
    expected = [judge.answer(*one, 8) for one in asked]
    assert found == expected
    assert len(set(expected[:5])) == 5, "every update changes the answer"
    await at_rest(worker)


async def test_a_stream_comes_in_order_and_ends_once(worker: LMWorker) -> None:
    found = await chunks(worker, request("s", cluster=1, max_tokens=12))
    assert {chunk.request_id for chunk in found} == {"s"}
    assert [chunk.finish_reason for chunk in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1].finish_reason == "length"
    assert [len(chunk.tokens) for chunk in found] == [1] * 12
    again = await chunks(worker, request("s", cluster=1, max_tokens=12))
    assert "".join(c.text for c in again) == "".join(c.text for c in found) != ""
    assert [c.tokens for c in again] == [c.tokens for c in found]


async def test_the_first_token_does_not_wait_for_the_rest(worker: LMWorker) -> None:
    stream = worker.generate(request("first", max_tokens=200))
    first = await anext(stream)
    assert len(first.tokens) == 1
    assert (await worker.stats()).running == 1
    await stream.aclose()


async def test_stop_strings_end_an_answer_and_are_not_in_it(worker: LMWorker) -> None:
    whole = await text(worker, request("w", max_tokens=12))
    stop = whole[5:7]
    found = await chunks(worker, request("s", max_tokens=12, stop=(stop,)))
    assert "".join(chunk.text for chunk in found) == whole[: whole.index(stop)]
    assert (found[-1].finish_reason, found[-1].stop_reason) == ("stop", stop)
    await at_rest(worker)


async def test_stop_tokens_end_an_answer(worker: LMWorker, judge) -> None:
    answer = judge.answer((5, 6, 7), "off", 8)
    end = next(token for token in answer[2:] if token not in answer[:2])
    found = await chunks(worker, request("s", stop_token_ids=(end,)))
    assert (found[-1].finish_reason, found[-1].stop_reason) == ("stop", end)
    assert sum(len(one.tokens) for one in found) == answer.index(end) + 1


async def test_the_end_of_text_ends_an_answer_but_not_too_early(worker: LMWorker, judge) -> None:
    likely = {"logit_bias": {1: 100.0}, "ignore_eos": False}
    found = await chunks(worker, request("e", **likely))
    assert [(one.tokens, one.finish_reason) for one in found] == [((1,), "stop")]
    at_least = await tokens(worker, request("m", **likely, min_tokens=3))
    assert (len(at_least), at_least[-1]) == (4, 1) and 1 not in at_least[:3]
    assert await tokens(worker, request("i", logit_bias={1: 100.0})) == (1,) * 8


@pytest.mark.parametrize("cluster", ["off", 2])
async def test_penalties_are_those_of_the_definition(
    worker: LMWorker, judge, cluster: int | str
) -> None:
    def penalised(logits: torch.Tensor, answer: list[int]) -> torch.Tensor:
        for token in set(answer):
            logits[token] -= 1.5 + 0.5 * answer.count(token)
        return logits

    expected = judge.answer((5, 6, 7), cluster, 12, penalised)
    params = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "max_tokens": 12}
    assert await tokens(worker, request("p", cluster=cluster, **params)) == expected


@pytest.mark.parametrize("cluster", ["off", None, 3])
async def test_log_probabilities_are_those_of_the_adapted_model(
    worker: LMWorker, judge, cluster: int | str | None
) -> None:
    found = await chunks(worker, request("l", cluster=cluster, logprobs=3))
    entries = [entry for chunk in found for entry in chunk.logprobs]
    answer = [entry.token for entry in entries]
    expected = judge.logits([5, 6, 7, *answer], cluster)[2:-1].log_softmax(-1)
    assert [token for chunk in found for token in chunk.tokens] == answer
    for entry, row in zip(entries, expected, strict=True):
        best = row.topk(3)
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
        assert [one.token for one in entry.top] == best.indices.tolist()
        assert [one.logprob for one in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


async def test_a_seed_decides_the_answer_in_any_company(worker: LMWorker) -> None:
    drawn = {"temperature": 1.0, "max_tokens": 12}
    alone = await tokens(worker, request("a", seed=7, **drawn))
    others = [tokens(worker, request(f"o{i}", seed=i, **drawn)) for i in range(3)]
    among = await asyncio.gather(tokens(worker, request("b", seed=7, **drawn)), *others)
    assert among[0] == alone
    assert len(set(among)) == 4


async def test_nothing_is_generated_where_nothing_is_asked_for(worker: LMWorker) -> None:
    [only] = await chunks(worker, request("n", max_tokens=0))
    assert (only.tokens, only.text, only.finish_reason) == ((), "", "length")


async def test_a_prompt_is_scored_or_its_request_refused(
    worker: LMWorker, judge, backend: str
) -> None:
    prompt = PROMPTS[1]
    one = request("p", prompt, 1, max_tokens=0, prompt_logprobs=0)
    if backend == "vllm":
        with pytest.raises(RequestError, match="cannot score a prompt"):
            await chunks(worker, one)
        with pytest.raises(RequestError, match="temperature 0 or 1"):
            await chunks(worker, request("t", cluster=1, logprobs=1, temperature=0.5))
        return
    [only] = await chunks(worker, one)
    assert only.prompt_logprobs is not None
    expected = judge.logits(list(prompt), 1)[:-1].log_softmax(-1)
    for entry, row in zip(only.prompt_logprobs[1:], expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)


async def test_a_prefix_is_computed_once_for_each_update(worker: LMWorker) -> None:
    prompt = tuple(100 + i % 90 for i in range(180))
    first = await chunks(worker, request("c0", prompt, 1))
    again = await chunks(worker, request("c1", prompt, 1))
    other = await chunks(worker, request("c2", prompt, 2))
    assert first[0].cached_tokens == other[0].cached_tokens == 0
    assert 100 < again[0].cached_tokens < 180
    assert [one.tokens for one in again] == [one.tokens for one in first]


async def test_closing_a_stream_frees_what_it_held(worker: LMWorker) -> None:
    streams = [worker.generate(request(f"a{i}", cluster=i, max_tokens=200)) for i in range(4)]
    await asyncio.gather(*(anext(one) for one in streams))
    await asyncio.gather(*(one.aclose() for one in streams))
    await at_rest(worker)


async def test_cancelling_the_reader_aborts_the_request(worker: LMWorker) -> None:
    task = asyncio.create_task(text(worker, request("a", max_tokens=200)))
    while worker.load == (0, 0):
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await at_rest(worker)


@pytest.mark.parametrize(
    ("bad", "error", "word"),
    [
        (request("x", tuple(range(2, 250)), max_tokens=20), ContextLengthError, "256"),
        (request("x", ()), RequestError, "no tokens"),
        (request("x", (5, 10**6)), ChameleonError, ""),
    ],
)
async def test_refusals_name_what_is_wrong_and_the_worker_goes_on(
    worker: LMWorker, bad: TokenizedRequest, error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        await text(worker, bad)
    await at_rest(worker)
    assert await text(worker, request("good"))


async def test_a_name_in_use_is_refused_and_its_owner_is_not_disturbed(worker: LMWorker) -> None:
    first = worker.generate(request("same", max_tokens=20))
    await anext(first)
    with pytest.raises(RequestError, match="in use"):
        await text(worker, request("same"))
    assert len([chunk async for chunk in first]) == 19


async def test_beyond_its_queue_a_worker_refuses(worker: LMWorker) -> None:
    streams = [worker.generate(request(f"r{i}", max_tokens=100)) for i in range(20)]
    firsts = await asyncio.gather(*(anext(one) for one in streams), return_exceptions=True)
    refused = [one for one in firsts if isinstance(one, BaseException)]
    assert refused and all(isinstance(one, OverloadedError) for one in refused)
    assert len(refused) < 20
    await asyncio.gather(*(one.aclose() for one in streams))
    await at_rest(worker)
