"""Clusters that follow the traffic of a running service, and what survives when parts of it die.

An application of its own beside the session's, so that only its clusters move.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from ray import serve

from cluster_router.learning.tenants import reader
from deploy.app import build
from deploy.config import AppConfig

pytestmark = pytest.mark.serve

APP = "learning"
MODEL = "smollm2-135m-instruct"
BLOCK = 10**9  # ids of the first tenant's clusters begin here, with the bundle's cluster 0
BUDGET = 200  # requests in which novel traffic must have got its own cluster
BANKING = (
    "I was charged twice for one transfer and the second payment has not been returned to my "
    "account. I have already waited three days for the refund. How do I get my money back?"
)
T = TypeVar("T")


def chess(seed: int) -> str:
    """Moves of a game: unlike anything that the bundle has a cluster for."""
    draw = random.Random(seed)
    squares = [file + rank for file in "abcdefgh" for rank in "12345678"]
    pieces = ["", "", "N", "B", "R", "Q", "K"]
    moves = [f"{draw.choice(pieces)}{draw.choice(squares)}" for _ in range(60)]
    return " ".join(f"{n // 2 + 1}. {move}" if n % 2 == 0 else move for n, move in enumerate(moves))


def until(check: Callable[[], T | None], within_s: float = 60) -> T:
    """What `check` gives, once it gives something. A service that restarts is waited for."""
    deadline = time.monotonic() + within_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            if found := check():
                return found
        except (httpx.HTTPError, KeyError) as error:
            last = error
        time.sleep(0.2)
    raise AssertionError(f"not within {within_s} s ({last!r})")


class Client:
    """Speaks for one namespace."""

    def __init__(self, url: str, namespace: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.namespace = namespace

    def complete(self, prompt: str, **fields: Any) -> dict[str, Any]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "namespace": self.namespace}
        return self.http.post("/v1/completions", json=body | fields).raise_for_status().json()

    def send(self, prompts: list[str], **fields: Any) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(lambda prompt: self.complete(prompt, **fields), prompts))

    def assign(self, prompt: str) -> dict[str, Any]:
        body = {"prompt": prompt, "namespace": self.namespace}
        return self.http.post("/v1/assign", json=body).raise_for_status().json()["adaptation"]

    def clusters(self) -> dict[str, Any]:
        params = {"namespace": self.namespace}
        return self.http.get("/v1/clusters", params=params).raise_for_status().json()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clusters")


@pytest.fixture(scope="module")
def application(service, folder: Path) -> Iterator[str]:
    """Its URL."""
    config = AppConfig.model_validate(
        {
            "engine": {"dtype": "float32", "max_context": 1024, "max_sequences": 8},
            "generator": {"patience_s": 60},
            "learner": {
                "uri": str(folder),
                "publish_interval_s": 0.5,
                "poll_interval_s": 0.3,
                "clusters": {"interval": 32, "min_size": 4},
            },
        }
    )
    serve.run(build(config), name=APP, route_prefix=f"/{APP}")
    yield f"{service.url}/{APP}"
    serve.delete(APP)


@pytest.fixture(scope="module")
def learned(application: str) -> tuple[Client, int]:
    """A tenant with novel traffic, and the cluster that it got."""
    client = Client(application, "chess club")
    before = {cluster["id"] for cluster in client.clusters()["data"]}
    assert client.assign(chess(-1))["mode"] == "static"
    for start in range(0, BUDGET, 40):
        client.send([chess(start + number) for number in range(40)])
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            found = client.assign(chess(-1))
            if found["mode"] == "cluster" and found["cluster"] % BLOCK not in before:
                return client, found["cluster"]
            time.sleep(0.2)
    raise AssertionError(f"no cluster within {BUDGET} requests")


def kill(deployment: str) -> None:
    """Kill -9 the replica of `deployment`, which is a child of this process's Ray node."""
    title = f"ray::ServeReplica:{APP}:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    assert len(found) == 1, found
    found[0].kill()


def test_novel_traffic_gets_its_own_cluster_and_update(learned: tuple[Client, int]) -> None:
    client, _ = learned
    settled(client)

    def scored(adaptation: object) -> tuple[list[float], dict[str, Any]]:
        scoring = {"max_tokens": 0, "echo": True, "logprobs": 0, "learn": False}
        answer = client.complete(chess(-1), adaptation=adaptation, **scoring)
        return answer["choices"][0]["logprobs"]["token_logprobs"][1:], answer["adaptation"]

    own, used = scored("auto")
    cluster = used["cluster"]
    [view] = [one for one in client.clusters()["data"] if one["id"] == cluster]
    assert view["size"] >= 4
    assert view["adapter_key"] == used["adapter_key"]
    forced, by_force = scored(cluster)
    assert (forced, by_force["adapter_key"]) == (own, used["adapter_key"])
    assert own not in (scored("off")[0], scored(BLOCK)[0])
    adapter = client.http.get(
        f"/v1/clusters/{cluster}/adapter", params={"namespace": client.namespace}
    )
    assert adapter.raise_for_status().content.startswith(b"PK")


def test_a_small_cluster_is_not_described(learned: tuple[Client, int]) -> None:
    client, _ = learned
    shown = client.clusters()["data"]
    assert any(one["characteristic_tokens"] for one in shown)
    small = [one for one in shown if one["size"] < 20]
    assert small
    assert not any(one["characteristic_tokens"] for one in small)


def test_what_may_not_be_learned_from_changes_nothing(
    application: str, learned: tuple[Client, int]
) -> None:
    client, _ = learned
    before = settled(client)
    client.send([chess(number) for number in range(1000, 1040)], learn=False)
    for number in range(5):
        client.assign(chess(number))
    time.sleep(2)  # four publish intervals
    assert client.clusters() == before
    client.send([chess(2000)])
    until(lambda: client.clusters()["snapshot_version"] > before["snapshot_version"])


def settled(client: Client) -> dict[str, Any]:
    """The clusters once all that was sent has been published and read."""
    found = client.clusters()
    while True:
        time.sleep(1.5)
        again = client.clusters()
        if again == found:
            return found
        found = again


def test_tenants_do_not_see_each_other(
    application: str, learned: tuple[Client, int], folder: Path
) -> None:
    client, cluster = learned
    other, default = Client(application, "bank"), Client(application, "")
    start = default.clusters()
    assert other.clusters() == start, "both begin with the bundle's"
    mine = settled(client)
    other.send([f"{BANKING} This is case {number}." for number in range(40)])
    until(lambda: other.clusters()["snapshot_version"] > start["snapshot_version"])
    assert client.clusters() == mine
    assert default.clusters() == start
    assert other.assign(chess(-1))["mode"] == "static"
    assert not {one["id"] for one in mine["data"]} & {one["id"] for one in settled(other)["data"]}
    answer = other.http.get(f"/v1/clusters/{cluster}", params={"namespace": "bank"})
    assert answer.status_code == 404


def test_clusters_survive_the_learner(learned: tuple[Client, int]) -> None:
    client, _ = learned
    before = settled(client)
    expected = client.assign(chess(3000))
    kill("CentroidLearner")
    assert client.complete(chess(3000))["adaptation"] == expected, "nobody waits for it"

    def moves_on() -> bool:
        client.send([chess(random.randrange(10**6))])
        return client.clusters()["snapshot_version"] > before["snapshot_version"]

    until(moves_on)
    assert novel(before) & novel(client.clusters())
    assert client.assign(chess(3000))["cluster"] in novel(before)


def novel(clusters: dict[str, Any]) -> set[int]:
    """Ids of the clusters that are not the bundle's."""
    return {one["id"] for one in clusters["data"] if one["id"] >= BLOCK + 32}


def test_clusters_survive_the_router(learned: tuple[Client, int]) -> None:
    client, _ = learned
    before = settled(client)
    kill("ClusterRouter")
    until(lambda: client.clusters() == before)


def test_a_damaged_snapshot_is_passed_over(learned: tuple[Client, int], folder: Path) -> None:
    client, _ = learned
    version = settled(client)["snapshot_version"]
    [root] = folder.iterdir()
    store = reader(str(root), client.namespace)
    assert store is not None and store.latest_version() == version
    [last] = root.glob(f"*/snapshot-{version:012d}-*")
    last.write_bytes(last.read_bytes()[:-100])
    kill("CentroidLearner")
    kill("ClusterRouter")

    def moves_on() -> bool:
        client.send([chess(random.randrange(10**6))])
        return client.clusters()["snapshot_version"] > version

    until(moves_on)
