"""A real Prometheus scrapes the running service: alert rules and the dashboard's panels over it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from reliability.processes import until

from deploy.app import build
from deploy.config import AppConfig

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus (`apt install prometheus`)"),
]

APP = "watched"
WAITED_FOR_S = 90
NOTHING_TO_SHOW = {
    "Embeddings B",  # refused
    "Embeddings C",  # lost on their way
    "Fallbacks A",
    "Loads, evictions, preemptions C",  # preemptions
    "Refinements A",
    "Updates asked for C",  # failures
}
"""Queries of what does not happen here."""


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/api/v1", timeout=30)
        self._ready = f"{url}/-/ready"

    def get(self, path: str, **params: str) -> Any:
        answer = self._http.get(path, params=params)
        assert answer.status_code == 200, f"{params}: {answer.text}"
        body = answer.json()
        assert body["status"] == "success" and not body.get("warnings"), body
        return body["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        return self.get("/query", query=query)["result"]

    def scrapes(self) -> bool:
        """Whether it has started, and gets something from its one target."""
        try:
            if httpx.get(self._ready).status_code != 200:
                return False
        except httpx.TransportError:  # not listening yet
            return False
        return [one["value"][1] for one in self.query("up")] == ["1"]


@pytest.fixture(scope="module")
def watched(service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an application that learns, estimates what it gains, and has room for two updates."""
    config = AppConfig.model_validate(
        {
            "engine": {
                "dtype": "float32",
                "max_context": 512,
                "max_sequences": 8,
                "max_adapters": 2,
            },
            "generator": {"patience_s": 60},
            "learner": {
                "uri": str(tmp_path_factory.mktemp("clusters")),
                "publish_interval_s": 0.5,
                "clusters": {"interval": 8},
            },
            "metrics": {"gain_share": 1.0},
        }
    )
    serve.run(build(config), name=APP, route_prefix=f"/{APP}")
    yield f"{service.url}/{APP}"
    serve.delete(APP)


@pytest.fixture(scope="module")
def traffic(service, watched: str) -> Iterator[None]:
    """Requests of every kind, one after the other, for as long as the tests run."""
    text = (Path(__file__).parent / "documents/banking.txt").read_text()
    body = {"model": service.model, "prompt": text[:400], "max_tokens": 12}
    kinds = [
        body,
        body | {"stream": True, "namespace": "tenant-a"},
        body | {"adaptation": "off"},
        *(body | {"adaptation": cluster} for cluster in range(4)),
        body | {"prompt": text * 20},  # beyond the context: refused
    ]
    ended = threading.Event()

    def send() -> None:
        with httpx.Client(base_url=watched, timeout=120) as http:
            while not ended.is_set():
                for kind in kinds:
                    http.post("/v1/completions", json=kind)
                ended.wait(1)

    sender = threading.Thread(target=send)
    sender.start()
    yield
    ended.set()
    sender.join(120)


@pytest.fixture(scope="module")
def prometheus(
    request: pytest.FixtureRequest,
    traffic: None,
    tmp_path_factory: pytest.TempPathFactory,
    unused_tcp_port_factory: Callable[[], int],
) -> Iterator[Prometheus]:
    """Started from deploy/monitoring/prometheus.yaml, with this machine's addresses in it."""
    folder = tmp_path_factory.mktemp("prometheus")
    monitoring = request.config.rootpath / "deploy/monitoring"
    config = yaml.safe_load((monitoring / "prometheus.yaml").read_text())
    [node] = ray.nodes()
    target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    config["rule_files"] = [str(monitoring / Path(one).name) for one in config["rule_files"]]
    # Not faster: after many tests on one Ray cluster a scrape takes a second itself.
    config["global"] |= {"scrape_interval": "4s", "evaluation_interval": "1s"}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = unused_tcp_port_factory()
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                str(PROMETHEUS),
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        api = Prometheus(f"http://127.0.0.1:{port}")
        until(api.scrapes, WAITED_FOR_S)
        yield api
    finally:
        process.terminate()
        process.wait(30)
    assert "level=ERROR" not in log.read_text() and "level=error" not in log.read_text()


def test_rules_are_evaluated_without_an_error(prometheus: Prometheus) -> None:
    def rules() -> dict[str, dict[str, Any]]:
        [group] = prometheus.get("/rules")["groups"]
        return {rule["name"]: rule for rule in group["rules"]}

    until(lambda: all(rule["health"] != "unknown" for rule in rules().values()), WAITED_FOR_S)
    found = rules()
    assert len(found) > 8
    assert [one for one in found.values() if one["health"] != "ok" or one.get("lastError")] == []
    # Until routers were first seen, it was about to be an alarm.
    until(lambda: rules()["ChameleonDown"]["state"] == "inactive", WAITED_FOR_S)


def test_every_panel_of_the_dashboard_has_numbers(
    prometheus: Prometheus, request: pytest.FixtureRequest
) -> None:
    board = json.loads((request.config.rootpath / "deploy/monitoring/dashboard.json").read_text())
    queries = {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$application", APP)
        .replace("$__rate_interval", "1m")
        for panel in board["panels"]
        for target in panel.get("targets", ())
    }
    assert len(queries) > 40

    def empty() -> set[str]:
        found = {name: prometheus.query(query) for name, query in queries.items()}
        return {name for name, result in found.items() if not result} - NOTHING_TO_SHOW

    with suppress(AssertionError):
        until(lambda: not empty(), WAITED_FOR_S)
    assert empty() == set()
