import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster_router.gain import GainProbe
from cluster_router.traffic import Traffic
from cluster_router.wire.errors import OverloadedError
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    Conditioning,
    SamplingParams,
    TokenChunk,
    TokenizedRequest,
    TokenLogprob,
)

KEY = AdapterKey("base", "hyper", 10, 3, "refined")
STATIC = AdapterKey("base", "hyper", None, 0)


class ScoringWorker:
    """Scores prompts: 2 nats per token under a cluster's update, 2.5 under the static one."""

    def __init__(self) -> None:
        self.requests: list[TokenizedRequest] = []
        self.stand_in: AdapterKey | None = None
        self.full = False

    async def generate(self, request: TokenizedRequest) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        if self.full:
            raise OverloadedError("no room")
        key = request.assignment.key
        assert key is not None
        loss = 2.5 if key.cluster is None else 2.0
        scores: list[float | None] = [None] + [-loss] * (len(request.prompt_tokens) - 1)
        entries = tuple(TokenLogprob(1, "", b"", score) for score in scores)
        yield TokenChunk(
            request.request_id,
            prompt_logprobs=entries,
            finish_reason="length",
            stand_in=self.stand_in,
        )


@pytest.fixture
def scorer() -> ScoringWorker:
    return ScoringWorker()


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


def asked(**changes: Any) -> TokenizedRequest:
    assignment = Assignment(KEY, 10, 0.8, 7, Conditioning(np.ones(3, np.float32), 5))
    request = TokenizedRequest("r", (1,) * 300, SamplingParams(), assignment, namespace="a")
    return replace(request, **changes)


def answer(traffic: Traffic, request: TokenizedRequest, tokens: int = 8, **last: Any) -> None:
    flight = traffic.begin(request)
    flight.chunk(TokenChunk("r", tokens=(1,) * tokens, **({"finish_reason": "stop"} | last)))
    flight.end()


async def probe(traffic: Traffic, scorer: Any, *requests: TokenizedRequest, **options: Any) -> None:
    one = GainProbe(scorer, traffic.gained, **({"share": 1.0} | options))
    traffic.listeners = [one.ended]
    for request in requests:
        answer(traffic, request)
    task = asyncio.create_task(one.run())
    for _ in range(100):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()


async def test_a_prompt_is_scored_both_ways(traffic: Traffic, scorer: ScoringWorker) -> None:
    await probe(traffic, scorer, asked())
    [found] = traffic.report().clusters
    assert (found.key.namespace, found.key.cluster) == ("a", 10)
    assert found.gain == pytest.approx((0.5,))
    own, static = scorer.requests
    assert (own.assignment.key, static.assignment.key) == (KEY, STATIC)
    assert own.background and static.background and not own.learn
    assert len(own.prompt_tokens) == len(static.prompt_tokens) == 256
    assert found.requests == {"cluster": 1}, "scoring is no traffic"


@pytest.mark.parametrize(
    "request_",
    [
        asked(learn=False),
        asked(prompt_tokens=(1,) * 8),
        asked(assignment=Assignment(STATIC, None, 0.1)),
        asked(assignment=Assignment(None)),
        asked(assignment=Assignment(KEY, 10, None)),
        asked(answered=True),
    ],
    ids=["learn false", "short", "static", "off", "forced", "answered"],
)
async def test_what_does_not_fit_is_left_alone(
    traffic: Traffic, scorer: ScoringWorker, request_: TokenizedRequest
) -> None:
    await probe(traffic, scorer, request_)
    assert scorer.requests == []


async def test_only_a_share_is_taken_and_few_wait(traffic: Traffic, scorer: ScoringWorker) -> None:
    draws = iter([0.05, 0.2, 0.01, 0.9])
    await probe(traffic, scorer, *[asked()] * 4, share=0.1, draw=lambda: next(draws))
    assert len(scorer.requests) == 4, "two requests, scored twice each"
    await probe(traffic, scorer, *[asked()] * 3, share=0.0, draw=lambda: 0.0)
    assert len(scorer.requests) == 4
    await probe(traffic, scorer, *[asked()] * 50)
    assert len(scorer.requests) == 4 + 8


async def test_no_room_and_no_update_leave_no_estimate(
    traffic: Traffic, scorer: ScoringWorker
) -> None:
    scorer.full = True
    await probe(traffic, scorer, asked(), asked())
    assert len(scorer.requests) == 2
    scorer.full, scorer.stand_in = False, STATIC
    await probe(traffic, scorer, asked())
    assert traffic.report().total.gains == 0
