"""Clusters of a running service, refined on the prompts of the tenants that allow it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from cluster_router.refinements import sealed
from deploy.app import build
from deploy.config import AppConfig

pytestmark = pytest.mark.serve

APP = "refinement"
MODEL = "smollm2-135m-instruct"
OPEN, CLOSED = "open", "closed"
WORDS = ("orders", "customers", "invoices", "payments", "products", "shipments", "suppliers")
FIELDS = ("id", "name", "total", "created", "status", "price", "city", "country", "discount")


def sql(seed: int) -> str:
    """Statements in a dialect that nobody else writes, though a cluster of the bundle is near."""
    draw = random.Random(seed)
    lines = [
        f"INSERT INTO {draw.choice(WORDS)} ({draw.choice(FIELDS)}, {draw.choice(FIELDS)}) "
        f"VALUES ({draw.randint(1, 99)}, '{draw.choice(WORDS)}') RETURNING ALL FIELDS;"
        for _ in range(4)
    ]
    return "\n".join(lines)


RECIPE = (
    "Preheat the oven to 180 degrees. Beat the butter with the sugar until it is pale, stir in the "
    "eggs one after the other, then the flour and a pinch of salt. Pour the batter into a buttered "
    "tin and bake it for forty minutes, until a skewer comes out clean. Let the cake cool down."
)


class Client:
    """Speaks for one namespace."""

    def __init__(self, url: str, namespace: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)
        self.namespace = namespace

    def complete(self, prompt: str, **fields: Any) -> dict[str, Any]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "namespace": self.namespace}
        return self.http.post("/v1/completions", json=body | fields).raise_for_status().json()

    def send(self, seeds: range, **fields: Any) -> None:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda seed: self.complete(sql(seed), **fields), seeds))

    def loss(self, seed: int) -> float:
        """Mean loss of a prompt's second half, from which nothing is learned."""
        scoring = {"max_tokens": 0, "echo": True, "logprobs": 0, "learn": False}
        answer = self.complete(sql(seed), **scoring)["choices"][0]["logprobs"]["token_logprobs"]
        scored = answer[len(answer) // 2 :]
        return -sum(scored) / len(scored)

    def cluster(self, cluster: int) -> dict[str, Any]:
        params = {"namespace": self.namespace}
        found = self.http.get(f"/v1/clusters/{cluster}", params=params)
        return found.raise_for_status().json()

    def refined(self, cluster: int, number: int, within_s: float = 120) -> dict[str, Any]:
        """The cluster once it has been refined `number` times."""
        deadline = time.monotonic() + within_s
        while (found := self.cluster(cluster))["refinement"] < number:
            assert time.monotonic() < deadline, f"not refined within {within_s} s: {found}"
            time.sleep(0.3)
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clusters")


@pytest.fixture(scope="module")
def url(service, folder: Path) -> Iterator[str]:
    config = AppConfig.model_validate(
        {
            "engine": {"dtype": "float32", "max_context": 1024, "max_sequences": 8},
            "generator": {"patience_s": 60},
            "learner": {"enabled": False, "uri": str(folder), "poll_interval_s": 0.3},
            "refinement": {
                "namespaces": [OPEN],
                "refinery": {
                    "every": 16,
                    "buffer": 16,
                    "refine": {"steps": 4, "batch": 6, "learning_rate": 0.045},
                    "common": {
                        "every": 24,
                        "refine": {"steps": 4, "batch": 6, "learning_rate": 0.045},
                    },
                },
            },
        }
    )
    serve.run(build(config), name=APP, route_prefix=f"/{APP}")
    yield f"{service.url}/{APP}"
    serve.delete(APP)


def test_a_cluster_is_refined_on_the_prompts_of_those_who_allow_it(url: str, folder: Path) -> None:
    allowing, refusing = Client(url, OPEN), Client(url, CLOSED)
    used = allowing.complete(sql(-1), learn=False)["adaptation"]
    cluster = used["cluster"]
    before = allowing.loss(-1)
    assert allowing.cluster(cluster)["refinement"] == 0

    refusing.send(range(16))
    allowing.send(range(16), learn=False)
    allowing.send(range(16), adaptation=cluster)  # it did not choose the cluster itself
    time.sleep(3)
    assert not list(folder.rglob("refined-*"))

    allowing.send(range(16))
    found = allowing.refined(cluster, 1)
    [file] = folder.rglob("refined-*")
    assert file.stat().st_size < 112 * 1024
    after = allowing.complete(sql(-1), learn=False)["adaptation"]
    assert refusing.cluster(cluster)["refinement"] == 0, "what one tenant taught is its own"
    assert refusing.complete(sql(-1))["adaptation"]["adapter_key"] == used["adapter_key"]
    assert after["adapter_key"] == found["adapter_key"] != used["adapter_key"]
    assert allowing.loss(-1) < before - 0.05
    adapter = allowing.http.get(f"/v1/clusters/{cluster}/adapter", params={"namespace": OPEN})
    assert adapter.raise_for_status().content.startswith(b"PK")


def test_what_is_common_to_a_tenant_reaches_a_cluster_that_learned_nothing(url: str) -> None:
    client = Client(url, OPEN)
    used = client.complete(RECIPE, learn=False)["adaptation"]
    cluster, sql_cluster = (
        used["cluster"],
        client.complete(sql(-1), learn=False)["adaptation"]["cluster"],
    )
    assert cluster != sql_cluster
    held = client.cluster(sql_cluster)["refinement"]
    client.send(range(16, 24))  # 24 with those of the test before
    client.refined(sql_cluster, held + 1)
    assert client.cluster(cluster)["refinement"] == 0
    client.complete(RECIPE)
    client.refined(cluster, 1)
    found = client.complete(RECIPE, learn=False)["adaptation"]
    assert found["cluster"] == cluster
    assert found["adapter_key"] != used["adapter_key"]


def test_a_damaged_refinement_is_served_unrefined(url: str, folder: Path) -> None:
    client = Client(url, OPEN)
    cluster = client.complete(sql(-1), learn=False)["adaptation"]["cluster"]
    held = client.refined(cluster, 1)["refinement"]
    [root] = {path.parent for path in folder.rglob("refined-*")}
    name = f"refined-{sealed(OPEN)}-{cluster}-{held + 7:06d}-0123456789abcdef.safetensors"
    (root / name).write_bytes(b"torn")
    client.refined(cluster, held + 7)
    assert client.complete(sql(-1), learn=False)["choices"][0]["text"]
    (root / name).unlink()
    while client.cluster(cluster)["refinement"] != held:
        time.sleep(0.2)
