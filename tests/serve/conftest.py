"""The real service, as `serve run deploy/config.yaml` starts it, on the session's Ray cluster."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import torch
import yaml
from openai import AsyncOpenAI, OpenAI
from ray import serve
from reliability.processes import until
from torch import nn

from deploy.environment import SETTINGS
from lm_workers.engine import EngineStats
from lm_workers.models import load_causal_lm
from training.base import FrozenBase

ROOT = Path(__file__).parents[2]
APP = "chameleon"


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    ray_address: str
    model: str

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def engines(self) -> list[EngineStats]:
        """Of each LM replica, once it has made sure that nothing is lost or held twice."""
        handle = serve.get_deployment_handle("LMReplica", APP)
        found: list[EngineStats] = handle.broadcast("check_integrity").results(timeout_s=60)
        return found

    async def generated_once_idle(self) -> int:
        """Tokens that the engines have generated when, within 30 s, they hold no request."""
        await asyncio.to_thread(
            until, lambda: not any(one.running or one.waiting for one in self.engines()), 30
        )
        return sum(one.generated_tokens for one in await asyncio.to_thread(self.engines))


class Float32Base(FrozenBase):
    """The evaluator's base model in the arithmetic of the test's service."""

    @cached_property
    def model(self) -> nn.Module:
        return load_causal_lm(self.path, torch.float32, self.device)


@pytest.fixture(scope="session")
def float32_base(default_model: Path) -> FrozenBase:
    return Float32Base(default_model)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def settings(port: int) -> dict[str, Any]:
    """The shipped config on a free port, in float32 so that answers can be compared exactly.

    Clusters stay as the bundle has them; `test_learning.py` has an application in which they move.
    """
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy/config.yaml").read_text())
    config["http_options"]["port"] = port
    # What `test_observation.py` reads: structured logs, and spans in files beside them.
    config["logging_config"] = {"encoding": "JSON", "log_level": "INFO"}
    config["tracing_config"] = {"enabled": True, "sampling_ratio": 1.0}
    config["applications"][0]["args"]["engine"] |= {"dtype": "float32", "max_context": 2048}
    config["applications"][0]["args"]["learner"] = {"enabled": False}
    # A busy machine may take its time; `test_affinity.py` has a generator that is really late.
    config["applications"][0]["args"]["generator"] = {"patience_s": 60}
    return config


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, default_model: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serve")
    port = free_port()
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings(port)))
    with (folder / "log").open("w") as log:
        with pytest.MonkeyPatch.context() as patch:
            for name in SETTINGS:  # the config file has them, as anybody's
                patch.delenv(name, raising=False)
            context = ray.init(
                address="local", num_cpus=8, include_dashboard=False, log_to_driver=False
            )
            address = str(context.address_info["address"])
            command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address]
            process = subprocess.Popen(
                [*command, str(config)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process, folder / "log")
            yield Service(f"http://127.0.0.1:{port}", address, "smollm2-135m-instruct")
        finally:
            process.terminate()
            process.wait(30)
            ray.shutdown()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=5).text == "ready":
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"the service did not get ready:\n{log.read_text()[-4000:]}")
