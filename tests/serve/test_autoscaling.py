"""LM replicas come with the load and go with it, and no request notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve

from cluster_router.client import ChameleonClient
from cluster_router.wire.types import GenerateResult, SamplingParams
from deploy.app import build
from deploy.client import connect
from deploy.config import AppConfig

pytestmark = pytest.mark.serve

APP = "autoscaling"
ANSWER = 120
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 1,
    "upscale_delay_s": 0,
    "downscale_delay_s": 1,
    "policy": {
        "policy_function": "deploy.autoscaling:LoadPolicy",
        "policy_kwargs": {"targets": {"tokens": 2 * ANSWER}},
    },
}
ENGINE = {
    "dtype": "float32",
    "max_sequences": 2,
    "max_batch_tokens": 64,
    "kernels": "reference",
    "cpu_threads": 1,
}


@pytest.fixture(scope="module")
def client(service: object, tiny_llama: Path) -> Iterator[ChameleonClient]:
    application = build(
        AppConfig.model_validate({"model": str(tiny_llama), "bundle": None, "engine": ENGINE})
    )
    lm = application._bound_deployment.init_args[1]
    lm._bound_deployment = lm._bound_deployment.options(
        num_replicas="auto", autoscaling_config=SCALING
    )
    serve.run(application, name=APP, route_prefix=f"/{APP}")
    yield connect(APP)
    serve.delete(APP)


def replicas() -> int:
    found = serve.status().applications[APP].deployments["LMReplica"].replica_states
    return int(found.get("RUNNING", 0))


async def until(count: int, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while await asyncio.to_thread(replicas) != count:
        assert time.monotonic() < deadline, f"not {count} replicas within {within_s} s"
        await asyncio.sleep(0.3)


async def test_replicas_follow_the_tokens_ahead(client: ChameleonClient) -> None:
    sampling = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)

    async def caller(answers: list[GenerateResult], busy: asyncio.Event) -> None:
        while busy.is_set():
            answers.append(await client.generate("hello", sampling=sampling))

    assert replicas() == 1
    answers: list[GenerateResult] = []
    busy = asyncio.Event()
    busy.set()
    callers = [asyncio.create_task(caller(answers, busy)) for _ in range(16)]
    try:
        await until(2, within_s=90)
    finally:
        busy.clear()
    await asyncio.gather(*callers)
    assert {len(one.tokens) for one in answers} == {ANSWER}
    await until(1, within_s=90)
    assert len((await client.generate("hello", sampling=sampling)).tokens) == ANSWER
