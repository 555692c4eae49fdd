"""Three real LM replicas: the requests of a cluster meet where its update is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from reliability.bundles import write_bundle

from cluster_router.client import ChameleonClient
from cluster_router.wire.types import GenerateResult, SamplingParams
from deploy.affinity import RESIDENT
from deploy.app import build
from deploy.cli.keys import add_key
from deploy.client import connect
from deploy.config import AppConfig

pytestmark = pytest.mark.serve

APP = MODEL = "affinity"
CLUSTERS = 7
COLD = CLUSTERS - 1  # asked for by the last test alone
PATIENCE = 4.0
SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
ENGINE = {"dtype": "float32", "max_sequences": 4, "max_batch_tokens": 64, "kernels": "reference"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The application's file of API keys."""
    return tmp_path_factory.mktemp("keys") / "keys.yaml"


@pytest.fixture(scope="module")
def authorized(keys: Path) -> dict[str, str]:
    """Headers of a caller whom the application lets in."""
    return {"Authorization": f"Bearer {add_key(keys, 'test')}"}


@pytest.fixture(scope="module")
def client(
    service: object,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
    keys: Path,
    authorized: dict[str, str],
) -> Iterator[ChameleonClient]:
    """A second application on the service's Ray cluster, with three tiny LM replicas."""
    bundle = tmp_path_factory.mktemp("affinity") / "bundle"
    write_bundle(tiny_llama, bundle, seed=0, clusters=CLUSTERS)
    application = build(
        AppConfig.model_validate(
            {
                "model": str(tiny_llama),
                "served_name": MODEL,
                "bundle": str(bundle),
                "access": {"keys": str(keys)},
                "generator": {"patience_s": PATIENCE},
                "learner": {"enabled": False},
                "engine": ENGINE | {"cpu_threads": 1},
            }
        )
    )
    lm = application._bound_deployment.init_args[1]
    lm._bound_deployment = lm._bound_deployment.options(num_replicas=3)
    serve.run(application, name=APP, route_prefix=f"/{APP}")
    yield connect(APP)
    serve.delete(APP)


async def residents(deployment: str) -> list[list[str]]:
    """What each replica of `deployment` says it holds."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    prefix = f"SERVE_REPLICA::{APP}#{deployment}#"
    actors = [ray.get_actor(name, "serve") for name in names if name.startswith(prefix)]
    return [
        stats[RESIDENT]
        for stats in await asyncio.gather(*(one.record_routing_stats.remote() for one in actors))
    ]


async def ask(client: ChameleonClient, cluster: int | str) -> GenerateResult:
    return await client.generate("hello", sampling=SHORT, adaptation=cluster)


async def test_requests_of_a_cluster_meet_on_one_replica(client: ChameleonClient) -> None:
    keys = {one.id: one.adapter_key for one in await client.clusters() if one.id != COLD}
    # A replica whose load a router has not heard in time, as right after its start, is passed over.
    for _ in range(3):
        await asyncio.gather(*(ask(client, "off") for _ in range(2 * CLUSTERS)))
        await asyncio.sleep(0.3)
    for _ in range(6):  # more than a round of reports, so with and without their help
        answers = await asyncio.gather(*(ask(client, cluster) for cluster in keys))
        assert [len(one.tokens) for one in answers] == [4] * len(keys)
        assert [one.adaptation.adapter_key for one in answers] == list(keys.values())
        await asyncio.sleep(0.3)
    held = await residents("LMReplica")
    assert len(held) == 3
    assert Counter(key for one in held for key in one) == Counter(keys.values())
    assert max(map(len, held)) <= len(keys) - 2, "clusters are spread over replicas"


async def test_a_hot_cluster_fans_out_and_its_update_is_generated_once(
    client: ChameleonClient,
) -> None:
    answers = await asyncio.gather(*(ask(client, 0) for _ in range(60)))
    assert len({one.tokens for one in answers}) == 1 and len(answers) == 60
    hot = answers[0].adaptation.adapter_key
    assert sum(hot in one for one in await residents("LMReplica")) > 1
    assert [one.count(hot) for one in await residents("AdapterGenerator")] == [1]


async def test_unadapted_requests_need_no_update(client: ChameleonClient) -> None:
    before = sorted(map(sorted, await residents("LMReplica")))
    answers = await asyncio.gather(*(ask(client, "off") for _ in range(12)))
    assert {one.adaptation.mode for one in answers} == {"off"}
    assert sorted(map(sorted, await residents("LMReplica"))) == before


def test_all_choices_of_one_request_are_answered(
    service, client: ChameleonClient, authorized: dict[str, str]
) -> None:
    body = {"model": MODEL, "prompt": "hello", "n": 8, "max_tokens": 4, "temperature": 1}
    for _ in range(5):
        answer = httpx.post(
            f"{service.url}/{APP}/v1/completions", json=body, headers=authorized, timeout=20
        )
        assert len(answer.raise_for_status().json()["choices"]) == 8


def test_keys_come_and_go_while_it_runs(
    service, client: ChameleonClient, keys: Path, authorized: dict[str, str]
) -> None:
    url = f"{service.url}/{APP}"

    def status(path: str, **fields: Any) -> int:
        return httpx.get(f"{url}{path}", timeout=20, **fields).status_code

    assert [status("/health"), status("/openapi.json"), status("/v1/models")] == [200, 200, 401]
    assert status("/v1/models", headers=authorized) == 200
    before = keys.read_text()
    fresh = {"Authorization": f"Bearer {add_key(keys, 'fresh', namespace='a')}"}
    until(lambda: status("/v1/models", headers=fresh) == 200)
    assert status("/v1/clusters?namespace=b", headers=fresh) == 403
    assert status("/v1/clusters", headers=fresh) == 200
    keys.write_text(before)
    until(lambda: status("/v1/models", headers=fresh) == 401)
    assert status("/v1/models", headers=authorized) == 200


def until(check: Callable[[], bool], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.3)


async def test_a_stuck_generator_holds_nobody_up_for_long(client: ChameleonClient) -> None:
    title = f"ray::ServeReplica:{APP}:AdapterGenerator"
    [stuck] = [one for one in psutil.process_iter(["cmdline"]) if titled(one, title)]
    stuck.suspend()
    try:
        begun = time.monotonic()
        late = await ask(client, COLD)
        assert PATIENCE <= time.monotonic() - begun < 4 * PATIENCE
        assert (late.adaptation.mode, late.adaptation.fallback) == ("static", True)
        warm = await ask(client, 0)
        assert (warm.adaptation.mode, warm.adaptation.fallback) == ("cluster", False)
    finally:
        stuck.resume()
    deadline = time.monotonic() + 30
    while (again := (await ask(client, COLD)).adaptation).fallback:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.3)
    assert (again.mode, again.cluster) == ("cluster", COLD)


def titled(process: psutil.Process, title: str) -> bool:
    return " ".join(process.info["cmdline"] or ()).startswith(title)
