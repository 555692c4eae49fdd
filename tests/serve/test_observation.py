"""What the running service tells of itself: metrics, logs and traces; and nothing of a prompt."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
import ray
import torch
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from adapter_gen.bundle import Bundle
from deploy.app import build
from deploy.config import AppConfig
from deploy.metrics import METRICS
from training.base import FrozenBase
from training.config import DataSettings
from training.data import SPLITS, Window, open_reader
from training.scoring import WindowScorer

pytestmark = pytest.mark.serve

CANARY = "zanzibarquux"
ADDED = {"application", "deployment", "replica"}
OPTIONAL = {  # owners that this service runs without, and what has had no occasion yet
    "CentroidLearner",
    "ClusterRefinery",
}


def scrape() -> str:
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return httpx.get(url, timeout=10).raise_for_status().text


def samples() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(scrape()):
        for sample in family.samples:
            if sample.name.startswith("ray_chameleon_"):
                found.setdefault(sample.name, []).append(sample)
    return found


def value(name: str, **labels: str) -> float:
    fitting = [one for one in samples().get(name, []) if labels.items() <= one.labels.items()]
    return sum(one.value for one in fitting)


def poll(condition: Any, within_s: float = 60) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def logs(service) -> Path:
    return Path(ray._private.worker._global_node.get_logs_dir_path())


@pytest.fixture(scope="module")
def asked(service) -> dict[str, Any]:
    """Answers to prompts that hold a canary: adapted, unadapted, streamed, refused."""
    http = httpx.Client(base_url=service.url, timeout=120)
    sql = f"SELECT {CANARY} FROM orders JOIN customers ON orders.id = customers.order_id WHERE "
    body = {"model": service.model, "prompt": sql, "max_tokens": 4, "temperature": 0}
    id = f"canary-{uuid4().hex}"
    headers = {"x-request-id": id}
    adapted = http.post("/v1/completions", json=body, headers=headers).raise_for_status().json()
    off = {"adaptation": "off", "max_tokens": 24, "ignore_eos": True}
    unadapted = http.post("/v1/completions", json=body | off).raise_for_status().json()
    chat = {
        "model": service.model,
        "messages": [{"role": "user", "content": sql}],
        "stream": True,
        "max_tokens": 4,
    }
    assert CANARY not in http.post("/v1/chat/completions", json=chat).raise_for_status().text
    refused = http.post("/v1/completions", json=body | {"prompt": sql * 500})
    assert refused.status_code == 400
    wrong = http.post("/v1/completions", json=body | {"prompt": {CANARY: 1}})
    assert wrong.status_code == 400
    return {"id": id, "adapted": adapted, "unadapted": unadapted}


def test_the_service_exports_what_the_table_says(service, asked: dict[str, Any]) -> None:
    poll(lambda: value("ray_chameleon_requests_total", mode="cluster") >= 1)
    poll(lambda: value("ray_chameleon_engine_generated_tokens_total") >= 12)
    exported = samples()
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}
    table = {metric.exported: metric for metric in METRICS}
    assert bare <= set(table), "exported, but not in the table"
    for name, found in exported.items():
        metric = table[re.sub(r"_(bucket|sum|count)$", "", name)]
        labels = set(found[0].labels) - {"le"}
        labels = {label for label in labels if not label.startswith(("Session", "Node", "Worker"))}
        assert labels - {"Component", "Version"} >= ADDED | set(metric.labels), name
        assert found[0].labels["deployment"] == metric.owner
    always = {
        metric.exported
        for metric in METRICS
        if metric.kind == "gauge" and metric.owner not in OPTIONAL and not metric.labels
    }
    assert always <= bare, "in the table, but not exported"


def test_metrics_count_what_was_asked(service, asked: dict[str, Any]) -> None:
    adaptation = asked["adapted"]["adaptation"]
    who = {"namespace": "(none)", "cluster": str(adaptation["cluster"])}
    poll(lambda: value("ray_chameleon_requests_total", **who, mode="cluster") >= 2)
    assert value("ray_chameleon_requests_total", cluster="(none)", mode="off") >= 1
    assert value("ray_chameleon_output_tokens_total", **who) >= 8
    assert value("ray_chameleon_first_token_seconds_count", mode="cluster") >= 2
    assert value("ray_chameleon_similarity_sum", mode="cluster") > 0
    poll(lambda: value("ray_chameleon_errors_total", code="context_length_exceeded") >= 1)
    assert value("ray_chameleon_updates_generated_total") >= 1
    assert value("ray_chameleon_adapters_resident") >= 1


def lines(logs: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for path in (logs / "serve").glob(pattern):
        for line in path.read_text().splitlines():
            yield json.loads(line)


def test_logs_are_structured_and_name_the_request(
    service, logs: Path, asked: dict[str, Any]
) -> None:
    def ended() -> list[dict[str, Any]]:
        found = lines(logs, "replica_chameleon_ClusterRouter*.log")
        return [
            line for line in found if line.get("request_id") == asked["id"] and "stream" in line
        ]

    [line] = poll(ended)
    adaptation = asked["adapted"]["adaptation"]
    assert (line["mode"], line["cluster"]) == ("cluster", adaptation["cluster"])
    assert (line["output_tokens"], line["outcome"], line["levelname"]) == (4, "length", "INFO")
    of_the_engine = lines(logs, "replica_chameleon_LMReplica*.log")
    assert any(line.get("request_id") == asked["id"] for line in of_the_engine)


def spans(logs: Path) -> list[dict[str, Any]]:
    found = []
    decoder = json.JSONDecoder()
    for path in (logs / "serve" / "spans").iterdir():
        text, place = path.read_text(), 0
        while (place := text.find("{", place)) >= 0:
            try:
                span, place = decoder.raw_decode(text, place)
            except json.JSONDecodeError:
                break  # being written
            found.append(span)
    return found


def test_one_trace_leads_through_router_worker_and_generator(
    service, logs: Path, asked: dict[str, Any]
) -> None:
    id = asked["adapted"]["id"]

    def trace() -> dict[str, dict[str, Any]]:
        everything = spans(logs)
        for span in everything:
            if span["attributes"].get("chameleon.request_id", "").startswith(id):
                trace_id = span["context"]["trace_id"]
                own = [one for one in everything if one["context"]["trace_id"] == trace_id]
                return {one["name"]: one for one in own}
        return {}

    ours = {"chameleon.prepare", "chameleon.answer", "chameleon.update", "chameleon.compute"}
    found = poll(lambda: trace() if ours <= trace().keys() else None)
    answer = found["chameleon.answer"]
    assert answer["attributes"]["chameleon.cluster"] == asked["adapted"]["adaptation"]["cluster"]
    assert answer["attributes"]["chameleon.output_tokens"] == 4
    assert [event["name"] for event in answer["events"]] == ["first token"]
    ids = {span["context"]["span_id"] for span in found.values()}
    roots = [span["name"] for span in found.values() if span["parent_id"] not in ids]
    assert len(roots) == 1, roots
    if not answer["attributes"]["chameleon.fallback"]:
        everything = [span["name"] for span in spans(logs)]
        assert "chameleon.generate_update" in everything


def test_nothing_of_a_prompt_is_written_or_exported(
    service, logs: Path, asked: dict[str, Any]
) -> None:
    poll(lambda: value("ray_chameleon_requests_total", mode="off") >= 1)
    assert CANARY not in scrape()
    read = [path for path in logs.rglob("*") if path.is_file()]
    assert any(path.parent.name == "spans" for path in read)
    found = [path for path in read if CANARY.encode() in path.read_bytes()]
    assert found == []
    answers = (asked["adapted"], asked["unadapted"])
    # A line of each, since logs escape line breaks.
    adapted, unadapted = (
        max(answer["choices"][0]["text"].splitlines(), key=len).strip() for answer in answers
    )
    assert len(unadapted) > 12
    for line in (adapted, unadapted):
        if len(line) > 12:
            assert [path for path in read if line.encode() in path.read_bytes()] == []


@pytest.fixture(scope="module")
def kept(service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An application that logs the requests of one namespace, and estimates every gain."""
    folder = tmp_path_factory.mktemp("requests")
    config = AppConfig.model_validate(
        {
            "engine": {"dtype": "float32", "max_context": 512, "max_sequences": 8},
            "generator": {"patience_s": 60},
            "learner": {"enabled": False},
            "metrics": {"gain_share": 1},
            "request_log": {"namespaces": ["open"], "uri": str(folder), "interval_s": 0.2},
        }
    )
    serve.run(build(config), name="kept", route_prefix="/kept")
    yield f"{service.url}/kept", folder
    serve.delete("kept")


def question(place: int) -> str:
    return (
        f"SELECT o.id, c.name FROM orders o JOIN customers c ON c.id = o.customer_id "
        f"WHERE o.total > {place * 7919} AND c.city = 'town{place}' ORDER BY o.created LIMIT"
    )


def test_only_whose_requests_may_be_kept_are_logged_for_training(
    service, kept: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = kept
    http = httpx.Client(base_url=url, timeout=120)

    def ask(place: int, **fields: Any) -> str:
        body = {"model": service.model, "prompt": question(place), "max_tokens": 9} | fields
        answer = http.post("/v1/completions", json=body).raise_for_status().json()
        return question(place) + answer["choices"][0]["text"]

    wanted = {ask(place, namespace="open") for place in range(24)}
    for fields in ({"namespace": "closed"}, {"namespace": "open", "learn": False}, {}):
        ask(99, **fields)
    poll(lambda: "town23" in "".join(logged(folder)))
    assert set(logged(folder)) == wanted
    assert [path.name for path in folder.iterdir()] == ["open"]
    reader = open_reader(folder, DataSettings(near_duplicates="keep"), tmp_path)
    assert reader.domains() == ["open"]
    read = {one.text for split in SPLITS for one in reader.documents("open", split)}
    assert read == wanted


def test_the_gain_of_live_traffic_is_what_its_prompts_gain(
    service, kept: tuple[str, Path], bundle_path: Path, float32_base: FrozenBase
) -> None:
    url, _ = kept
    http = httpx.Client(base_url=url, timeout=120)
    gains: dict[int, list[float]] = {}
    bundle = Bundle.load(bundle_path, None)
    scorer = WindowScorer(float32_base, bundle.spec)
    for place in range(100, 106):
        body = {"model": service.model, "prompt": question(place), "max_tokens": 9}
        body |= {"namespace": "measured", "ignore_eos": True}
        answer = http.post("/v1/completions", json=body).raise_for_status().json()
        cluster = answer["adaptation"]["cluster"]
        gains.setdefault(cluster, []).append(gain(scorer, bundle, question(place), cluster))
        # One prompt is scored at a time, and few wait.
        poll(lambda: estimates() == sum(map(len, gains.values())))
    for cluster, expected in gains.items():
        who = {"application": "kept", "namespace": "measured", "cluster": str(cluster)}
        live = value("ray_chameleon_conditioning_gain_nats", **who)
        assert live == pytest.approx(np.mean(expected), abs=1e-4)
        assert abs(live) > 1e-3, "the update should be felt"


def estimates() -> float:
    return value(
        "ray_chameleon_conditioning_gain_estimates_total",
        application="kept",
        namespace="measured",
    )


def gain(scorer: WindowScorer, bundle: Bundle, text: str, cluster: int) -> float:
    """Nats per token by which the evaluator finds `cluster`'s update better than the static one."""
    tokens = np.array(scorer.base.tokenizer(text)["input_ids"], np.int32)
    window = Window(tokens, 1, "sql", len(text))
    row = bundle.snapshot.row(cluster)
    assert row is not None
    conditioning = bundle.snapshot.conditioning_of(row)
    vector = torch.from_numpy(np.array(conditioning.vector, np.float32))[None]
    with torch.no_grad():
        generated = bundle.hypernetwork(vector, torch.tensor([conditioning.support]))
    static = scorer.score([window], bundle.bases)
    own = scorer.score([window], bundle.bases, generated)
    return float((static - own)[0]) / window.scored


def logged(folder: Path) -> list[str]:
    parts = [gzip.decompress(path.read_bytes()) for path in sorted(folder.rglob("*.jsonl.gz"))]
    return [json.loads(line)["text"] for part in parts for line in part.splitlines()]
