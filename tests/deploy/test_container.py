"""Dockerfile and compose file: linted, and naming nothing that is not there. Nothing is built."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.config import AppConfig
from deploy.environment import FRONT, SETTINGS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_hadolint_has_nothing_to_say() -> None:
    command = ["hadolint", "--no-color", str(DEPLOY / "Dockerfile")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="no docker-compose here")
def test_compose_accepts_its_file() -> None:
    files = ["-f", str(DEPLOY / "compose.yaml"), "-f", str(DEPLOY / "compose.gpu.yaml")]
    command = ["docker-compose", *files, "config", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_gpu_file_adds_to_the_service_alone() -> None:
    added = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]
    [(name, service)] = added.items()
    assert service["build"]["args"].keys() == compose()["services"][name]["build"]["args"].keys()
    assert f"{service['build']['args']['ACCELERATOR']} = [" in (ROOT / "pyproject.toml").read_text()
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_what_is_copied_and_mounted_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]
    assert len(copied) >= 9
    kept = (ROOT / ".dockerignore").read_text().split()
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in kept, f"{name} does not reach the build"
    [command] = re.findall(r'^CMD \["(\S+)"\]$', text, re.M)
    assert (ROOT / command).stat().st_mode & 0o111
    services = compose()["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    for source in (mount.split(":")[0] for mount in mounts):
        if source.startswith("."):
            assert (DEPLOY / source).exists(), source
        else:
            assert source in compose()["volumes"]
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services), name
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), "open to this machine only"


def test_prometheus_scrapes_the_port_that_the_container_opens() -> None:
    prometheus = yaml.safe_load((DEPLOY / "monitoring/prometheus.yaml").read_text())
    [[target]] = [one["static_configs"][0]["targets"] for one in prometheus["scrape_configs"]]
    service, port = target.split(":")
    assert service in compose()["services"]
    assert f"METRICS_PORT:-{port}" in (DEPLOY / "start.sh").read_text()
    assert port in re.findall(r"^EXPOSE (.+)$", (DEPLOY / "Dockerfile").read_text(), re.M)[0]


@pytest.mark.parametrize(
    "name",
    ["container.yaml", "config.yaml", "multi_gpu.yaml", "tensor_parallel.yaml", "vllm.yaml"],
)
def test_configs_are_what_serve_and_we_take(name: str) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / name).read_text()))
    for application in config.applications:
        AppConfig.model_validate(application.args)
    assert config.controller_options.runtime_env == {"env_vars": SETTINGS}


def test_proxies_of_the_container_send_lost_requests_again() -> None:
    assert f" {FRONT}={SETTINGS[FRONT]}\n" in (DEPLOY / "Dockerfile").read_text()


def test_grafana_is_given_its_dashboard() -> None:
    grafana = compose()["services"]["grafana"]
    [mounted] = [one.split(":")[1] for one in grafana["volumes"] if "dashboard.json" in one]
    provider = yaml.safe_load((DEPLOY / "monitoring/grafana/dashboards/chameleon.yaml").read_text())
    assert str(Path(mounted).parent) == provider["providers"][0]["options"]["path"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == mounted
    source = yaml.safe_load((DEPLOY / "monitoring/grafana/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
