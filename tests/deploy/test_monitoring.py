"""Dashboard and alert rules name what is exported; their queries parse; the page is up to date."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.metrics import METRICS

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
NAME = re.compile(r"\bray_[a-z_]+")


def exported() -> dict[str, tuple[str, ...]]:
    """Names that are scraped, each with the labels that the table gives it."""
    names: dict[str, tuple[str, ...]] = {}
    for metric in METRICS:
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.exported + end: metric.labels for end in ends}
    return names


def panels() -> list[dict[str, Any]]:
    return json.loads((MONITORING / "dashboard.json").read_text())["panels"]


def queries() -> dict[str, str]:
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel.get("targets", ())
    }
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        found[rule["alert"]] = rule["expr"]
    return found


@pytest.mark.parametrize(("where", "query"), queries().items(), ids=queries())
def test_queries_name_what_is_exported(where: str, query: str) -> None:
    names = NAME.findall(query)
    assert names
    assert set(names) <= set(exported()), where
    labels = {label for name in names for label in exported()[name]}
    allowed = labels | {"le", "application", "deployment", "replica"}
    grouped = re.findall(r"\bby \(([^)]*)\)", query)
    used = {label.strip() for group in grouped for label in group.split(",")}
    used |= set(re.findall(r"([a-z_]+)(?:=~|!~|!=|=)\"", query))
    assert used <= allowed, where


def test_every_metric_that_people_watch_is_on_the_dashboard() -> None:
    shown = " ".join(queries().values())
    hidden = {metric.name for metric in METRICS if metric.exported not in shown}
    assert hidden <= {
        "updates_in_flight",
        "updates_cached",
        "update_cache_bytes",
        "snapshot_version",
        "prompts_offered",
    }


def test_the_dashboard_is_whole() -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and board["uid"] and board["schemaVersion"] >= 39
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = {
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    }
    assert len(cells) == sum(place["w"] * place["h"] for place in places), "panels overlap"
    assert max(x for x, _ in cells) < 24
    variables = {f"${one['name']}" for one in board["templating"]["list"]}
    for query in re.findall(r"\$[a-z]+", json.dumps(board)):
        assert query in variables, query


def lost(given: Any, back: Any, place: str = "") -> Iterator[str]:
    """Where `back` lacks something of `given`."""
    if isinstance(given, dict) and isinstance(back, dict):
        for name, one in given.items():
            yield from lost(one, back.get(name), f"{place}/{name}")
    elif isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        for number, pair in enumerate(zip(given, back, strict=True)):
            yield from lost(*pair, f"{place}/{number}")
    elif given != back:
        yield place


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """Its own SDK reads the file and writes it again: fields unknown to it would be gone."""
    needed = "needs the test extra"
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason=needed)
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins", reason=needed)
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder", reason=needed)
    plugins.register_default_plugins()
    board = json.loads((MONITORING / "dashboard.json").read_text())

    def written_again(board: dict[str, Any]) -> Any:
        text = encoder.JSONEncoder().encode(models.Dashboard.from_json(board))
        return json.loads(text)

    assert list(lost(board, written_again(board))) == []
    board["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    assert list(lost(board, written_again(board))) == ["/panels/1/fieldConfig/defaults/units"]


def test_names_are_as_prometheus_wants_them() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z_]*", metric.name)
        assert not metric.name.endswith("_total"), "added where it is scraped"
        assert metric.help.endswith(".")
        assert bool(metric.bounds) == (metric.kind == "histogram")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_rules_and_queries(tmp_path: Path) -> None:
    shown = [
        {"record": f"panel:{index}", "expr": query.replace("$__rate_interval", "1m")}
        for index, query in enumerate(queries().values())
    ]
    rules = tmp_path / "queries.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": shown}]}))
    for file in (rules, MONITORING / "alerts.yaml"):
        run = subprocess.run(
            ["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
