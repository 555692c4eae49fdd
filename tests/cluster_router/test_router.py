import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster_router.clusters import Assigner
from cluster_router.embedding import TokenEmbedder
from cluster_router.index import FaissIndex
from cluster_router.prompts import EncodedPrompt, PromptEncoder
from cluster_router.router import ClusterRouter, ServedModel
from cluster_router.tenants import TenantAssigners
from cluster_router.wire.errors import (
    ContextLengthError,
    EngineError,
    OverloadedError,
    RequestError,
    UnknownClusterError,
)
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import (
    AdapterKey,
    GenerateRequest,
    Message,
    Observation,
    SamplingParams,
)


def ask(prompt: str = "sail wind", max_tokens: int = 3, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens), **fields)


async def test_answer_carries_what_adapted_it(router: ClusterRouter, worker: Any) -> None:
    result = await router.generate(ask(request_id="r1"))
    assert (result.text, result.tokens, result.finish_reason) == ("w0 w1 w2 ", (0, 1, 2), "length")
    assert (result.request_id, result.prompt_tokens) == ("r1", 3)
    assert (result.adaptation.mode, result.adaptation.cluster) == ("cluster", 10)
    assert result.adaptation.adapter_key == AdapterKey("base", "hyper", 10, 1).id
    [sent] = worker.requests
    assert sent.assignment.conditioning.support == 5
    assert worker.closed == 1


async def test_stream_yields_chunks_as_the_worker_makes_them(router: ClusterRouter) -> None:
    chunks = [chunk async for chunk in router.stream(ask())]
    assert [chunk.text for chunk in chunks] == ["w0 ", "w1 ", "w2 "]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]


@pytest.mark.parametrize(
    ("fields", "mode", "cluster"),
    [
        ({"prompt": "judge law"}, "cluster", 20),
        ({"prompt": "tool"}, "static", None),
        ({"prompt": "judge law", "adaptation": 10}, "cluster", 10),
        ({"prompt": "judge law", "adaptation": "off"}, "off", None),
    ],
)
async def test_adaptation_modes(
    router: ClusterRouter, fields: dict[str, Any], mode: str, cluster: int | None
) -> None:
    adaptation = (await router.generate(ask(**fields))).adaptation
    assert (adaptation.mode, adaptation.cluster) == (mode, cluster)


async def test_the_chat_template_does_not_sway_the_assignment(router: ClusterRouter) -> None:
    chat = GenerateRequest(messages=(Message(role="user", content="sail wind"),))
    plain = await router.assign(ask("sail wind"))
    assert (await router.assign(chat)).similarity == plain.similarity


async def test_assignment_is_a_function_of_the_request(router: ClusterRouter) -> None:
    alone = (await router.assign(ask("sail court"))).similarity
    for other in ("judge", "law law wind", "mast"):
        await router.prepare(ask(other))
    assert (await router.assign(ask("sail court"))).similarity == alone


async def test_only_what_may_be_learned_from_is_shown(
    router: ClusterRouter, observed: list[Observation]
) -> None:
    prepared = await router.prepare(ask("sail wind", namespace="a"))
    await router.prepare(ask("sail wind", learn=False))
    await router.assign(ask("sail wind"))
    await router.prepare(ask("judge", adaptation="off"))
    assert [seen.namespace for seen in observed] == ["a", ""]
    assert observed[0].embedding.shape == (32,)
    assert observed[0].prompt_tokens == prepared.prompt_tokens
    assert observed[0].assignment is prepared.assignment
    assert observed[1].assignment.key is None
    with pytest.raises(RequestError):
        await router.prepare(ask(max_tokens=1000))
    assert len(observed) == 2


async def test_what_holds_an_earlier_answer_is_marked(
    router: ClusterRouter, observed: list[Observation]
) -> None:
    first, answer = Message(role="user", content="sail"), Message(role="assistant", content="wind")
    sampling = SamplingParams(max_tokens=1)
    for turns in ((first,), (first, answer, first)):
        prepared = await router.prepare(GenerateRequest(messages=turns, sampling=sampling))
        assert prepared.answered == observed[-1].answered == (len(turns) > 1)


async def test_unnamed_requests_get_distinct_ids(router: ClusterRouter) -> None:
    names = {(await router.prepare(ask())).request_id for _ in range(3)}
    assert len(names) == 3
    assert "" not in names


async def test_refusals_come_before_the_stream(router: ClusterRouter, worker: Any) -> None:
    with pytest.raises(RequestError):
        await anext(router.stream(GenerateRequest()))
    with pytest.raises(UnknownClusterError):
        await anext(router.stream(ask(adaptation=99)))
    assert worker.requests == []


@pytest.mark.parametrize("form", ["prompt", "prompt_tokens", "messages"])
async def test_a_long_prompt_does_not_hold_up_the_loop(
    router: ClusterRouter, prompts: PromptEncoder, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    long = "sail " * 4000
    fields: dict[str, Any] = {
        "prompt": long,
        "prompt_tokens": (2,) * 2**14,
        "messages": [Message(role="user", content=long[: len(long) // 2])] * 2,
    }
    encode, begun, goes_on = prompts.encode, threading.Event(), threading.Event()

    def encode_slowly(request: GenerateRequest) -> EncodedPrompt:
        begun.set()
        assert goes_on.wait(5)
        return encode(request)

    monkeypatch.setattr(prompts, "encode", encode_slowly)
    asked = asyncio.create_task(router.prepare(GenerateRequest(**{form: fields[form]})))
    assert await asyncio.to_thread(begun.wait, 5)
    goes_on.set()  # only a loop that goes on comes here
    with pytest.raises(ContextLengthError):
        await asked
    assert router.traffic.report().total.errors == {"context_length_exceeded": 1}


async def test_a_namespace_is_read_before_its_first_request_is_assigned(
    prompts: PromptEncoder,
    embedder: TokenEmbedder,
    ship_and_court: ClusterSnapshot,
    worker: Any,
    exporter: Any,
) -> None:
    learned = replace(ship_and_court, version=8, ids=ship_and_court.ids + 1000)
    calls: list[Callable[[ClusterRouter], Any]] = [
        lambda router: router.generate(ask(namespace="a", adaptation=1010)),
        lambda router: router.cluster(1020, "a"),
        lambda router: router.export(1020, "a"),
    ]
    for call in calls:
        assigners = TenantAssigners(
            lambda _: Assigner(ship_and_court, FaissIndex, "base", "hyper"), lambda *_: learned
        )
        model = ServedModel("tiny", created=1, context_length=32, vocab_size=12)
        router = ClusterRouter(model, prompts, embedder, assigners, worker, exporter)
        await call(router)
        assert [info.id for info in await router.clusters("a")] == [1010, 1020]
        assert [info.id for info in await router.clusters()] == [10, 20]


async def test_closing_the_stream_closes_the_workers(router: ClusterRouter, worker: Any) -> None:
    stream = router.stream(ask(max_tokens=20))
    await anext(stream)
    assert worker.closed == 0
    await stream.aclose()
    assert worker.closed == 1


async def test_cancelling_the_reader_closes_the_workers_stream(
    router: ClusterRouter, worker: Any
) -> None:
    task = asyncio.create_task(router.generate(ask(max_tokens=29)))
    while not worker.requests:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.closed == 1


async def test_worker_errors_reach_the_caller(router: ClusterRouter, worker: Any) -> None:
    worker.fails_after, worker.failure = 1, OverloadedError("full")
    with pytest.raises(OverloadedError):
        await router.generate(ask())
    assert worker.closed == 1


async def test_an_answer_without_an_end_is_an_error(router: ClusterRouter, worker: Any) -> None:
    worker.cut_after = 2
    with pytest.raises(EngineError, match="cut off"):
        await router.generate(ask())


async def test_export_hands_over_the_clusters_key_and_conditioning(
    router: ClusterRouter, exporter: Any
) -> None:
    key = AdapterKey("base", "hyper", 20, 2)
    assert await router.export(20) == b"PK" + key.id.encode()
    [(exported, conditioning, form)] = exporter.exported
    assert form == "whole"
    assert exported == key
    assert np.array_equal(conditioning.vector, [3, 4, 5])
    with pytest.raises(UnknownClusterError):
        await router.export(21)


async def test_views(router: ClusterRouter) -> None:
    snapshot, clusters = await router.table()
    assert [info.id for info in clusters] == [10, 20]
    assert snapshot.version == 7
    assert (await router.cluster(20)).size == 105
    assert router.remaining((1,) * 30) == 2
    assert router.text((0, 2)) == "<s> sail"
    assert router.model.name == "tiny"
