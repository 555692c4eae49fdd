import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster_router.delivery import Delivery
from cluster_router.router import ClusterRouter
from cluster_router.tally import Key, StreamEnd, quantile
from cluster_router.traffic import CUT_OFF, OTHER, Traffic
from cluster_router.wire.errors import EngineError, OverloadedError, RequestError
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    GenerateRequest,
    SamplingParams,
    TokenChunk,
    TokenizedRequest,
)

CANARY = "sail wind"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ends() -> list[StreamEnd]:
    return []


@pytest.fixture
def traffic(clock: Clock, ends: list[StreamEnd]) -> Traffic:
    return Traffic(clock=clock, listeners=[lambda _, end: ends.append(end)])


def request(cluster: int | None = 3, namespace: str = "", prompt: int = 10) -> TokenizedRequest:
    key = AdapterKey("base", "hyper", cluster, 1)
    assignment = Assignment(key, cluster, similarity=0.25, snapshot_version=4)
    return TokenizedRequest("r", (1,) * prompt, SamplingParams(), assignment, namespace=namespace)


def stream(traffic: Traffic, asked: TokenizedRequest, tokens: int = 3, **last: Any) -> None:
    flight = traffic.begin(asked)
    for place in range(tokens):
        ending = {"finish_reason": "stop"} | last if place == tokens - 1 else {}
        flight.chunk(TokenChunk("r", tokens=(place,), **ending))
    flight.end()


def test_a_streams_times_and_counts(traffic: Traffic, clock: Clock, ends: list[StreamEnd]) -> None:
    flight = traffic.begin(request())
    for wait, chunk in (
        (2.0, TokenChunk("r", text="a", tokens=(1,), cached_tokens=6)),
        (0.5, TokenChunk("r", tokens=(2,))),
        (1.5, TokenChunk("r", text="b", tokens=(3,), finish_reason="length")),
    ):
        clock.now += wait
        flight.chunk(chunk)
    assert traffic.report().total.in_flight == 1
    assert traffic.report().total.output_tokens == 3, "counted as they stream"
    clock.now += 1
    flight.end()
    [end] = ends
    assert (end.first_token_s, end.token_gap_s, end.longest_gap_s, end.seconds) == (2, 1, 1.5, 5)
    assert (end.prompt_tokens, end.cached_tokens, end.output_tokens) == (10, 6, 3)
    assert (end.finish_reason, end.error, end.adaptation.mode) == ("length", None, "cluster")
    [found] = traffic.report().clusters
    assert (found.key, found.in_flight, found.requests) == (Key("", 3), 0, {"cluster": 1})
    assert (found.first_token_s, found.seconds, found.similarity) == ((2,), (5,), (0.25,))
    assert found.errors == {}


async def test_an_answer_that_is_held_back_has_the_times_at_which_it_came(
    traffic: Traffic, clock: Clock, ends: list[StreamEnd]
) -> None:
    class Slow:
        async def generate(self, asked: TokenizedRequest) -> AsyncIterator[TokenChunk]:
            for wait, token in ((2.0, 1), (0.5, 2), (1.5, 3)):
                clock.now += wait
                yield TokenChunk("r", tokens=(token,), finish_reason="stop" if token == 3 else None)
            clock.now += 1

    whole = replace(request(), whole=True)
    flight = traffic.begin(whole)
    async for chunk in Delivery(Slow(), clock=clock).generate(whole):
        assert clock.now == 1005
        flight.chunk(chunk)
    flight.end()
    [end] = ends
    assert (end.first_token_s, end.token_gap_s, end.longest_gap_s, end.seconds) == (2, 1, 1.5, 5)


def test_keys_are_kept_apart_and_add_up(traffic: Traffic) -> None:
    stream(traffic, request(3))
    stream(traffic, request(3, "a"))
    stream(traffic, request(None), stand_in=None)
    stream(traffic, request(3), stand_in=AdapterKey("base", "hyper", None, 0))
    report = traffic.report()
    by_key = {found.key: found for found in report.clusters}
    assert set(by_key) == {Key("", 3), Key("a", 3), Key("", None)}
    assert by_key[Key("", 3)].requests == {"cluster": 1, "static": 1}
    assert by_key[Key("", 3)].fallbacks == 1
    assert report.total.requests == {"cluster": 2, "static": 2}
    assert report.total.output_tokens == 12


def test_rates_are_of_recent_windows(traffic: Traffic, clock: Clock) -> None:
    stream(traffic, request())
    clock.now += 200
    for _ in range(20):
        stream(traffic, request(), tokens=5)
    clock.now += 5
    rates = traffic.report((10.0, 300.0)).total.rates
    assert rates[10].requests == pytest.approx(2)
    assert rates[10].output_tokens == pytest.approx(10)
    assert rates[300].requests == pytest.approx(21 / 205), "not of before the start"
    clock.now += 1000
    assert traffic.report((300.0,)).total.rates[300].requests == 0


def test_keys_are_bounded(clock: Clock) -> None:
    traffic = Traffic(max_keys=4, clock=clock)
    kept = traffic.begin(request(0))
    for cluster in range(1, 10):
        stream(traffic, request(cluster))
    report = traffic.report()
    assert [found.key.cluster for found in report.clusters] == [OTHER.cluster, 0, 8, 9]
    assert report.clusters[0].requests == {"cluster": 7}
    assert len(report.clusters[0].seconds) == 7
    assert report.clusters[0].rates[10].requests == pytest.approx(7)
    flights = [traffic.begin(request(cluster)) for cluster in (8, 9, 10, 11)]
    for flight in (kept, *flights):
        flight.end()
    report = traffic.report()
    assert len(report.clusters) == 4
    assert sum(sum(found.requests.values()) for found in report.clusters) == 14
    assert all(found.in_flight == 0 for found in report.clusters)


def test_samples_are_bounded(traffic: Traffic) -> None:
    for place in range(1000):
        stream(traffic, request())
        traffic.gained("", 3, place)
    [found] = traffic.report().clusters
    assert len(found.seconds) == len(found.gain) == 128
    assert (found.gain[-1], found.gains) == (999, 1000)


def ask(prompt: str = CANARY, max_tokens: int = 3, **fields: Any) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens), **fields)


async def test_the_router_counts_every_stream_however_it_ends(
    router: ClusterRouter, worker: Any
) -> None:
    await router.generate(ask(namespace="a"))

    left = router.stream(ask(max_tokens=20))
    await anext(left)
    await left.aclose()

    after_the_last = router.stream(ask(max_tokens=1))
    await anext(after_the_last)
    await after_the_last.aclose()

    worker.fails_after, worker.failure = 1, OverloadedError("full")
    with pytest.raises(OverloadedError):
        await router.generate(ask())
    worker.fails_after, worker.cut_after = None, 1
    with pytest.raises(EngineError):
        await router.generate(ask())

    worker.cut_after, worker.stall = None, asyncio.Event()
    task = asyncio.create_task(router.generate(ask()))
    await asyncio.sleep(0.01)
    assert router.traffic.report().total.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    total = router.traffic.report().total
    assert total.in_flight == 0
    assert total.requests == {"cluster": 6}
    assert total.errors == {"cancelled": 2, "overloaded": 1, CUT_OFF: 1}
    assert router.traffic.report().clusters[0].key == Key("a", 10)


async def test_refusals_are_counted_by_code(router: ClusterRouter) -> None:
    for wrong in (ask(max_tokens=1000), ask(adaptation=99), GenerateRequest()):
        with pytest.raises(RequestError):
            await router.prepare(wrong)
    with pytest.raises(RequestError):
        await router.assign(ask(adaptation=99))
    await router.assign(ask())
    total = router.traffic.report().total
    assert total.requests == {}
    assert total.errors == {
        "context_length_exceeded": 1,
        "cluster_not_found": 1,
        "invalid_request_error": 1,
    }


async def test_nothing_of_a_prompt_or_an_answer_is_kept(router: ClusterRouter) -> None:
    await router.generate(ask())
    report = repr(router.traffic.report())
    assert CANARY not in report and "w0" not in report


def test_quantile() -> None:
    values = np.random.default_rng(0).permutation(100).tolist()
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1)) == (50, 99, 99)
    assert quantile([], 0.5) is None
