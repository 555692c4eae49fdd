"""The whole service: Ray Serve, router, generator and LM replica, over HTTP streams."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections import deque
from typing import Any

import httpx
import ray
from ray import serve
from serving_bench.engines.chameleon import engine_config
from serving_bench.workload import Request, Trace, Workload

from deploy.app import build
from deploy.config import AppConfig, LearningConfig

MODEL = "bench"
READY_S = 300


class Service:
    """The application of `deploy/config.yaml` on a Ray cluster and a port of its own."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.version = f"ray {ray.__version__}"
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        port = free_port()
        config = AppConfig(
            model=job["model"],
            served_name=MODEL,
            bundle=job["bundle"],
            engine=engine_config(job),
            learner=LearningConfig(enabled=False),  # every run has the same clusters
        )
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(config), name="chameleon", route_prefix="/")
        self._url = f"http://127.0.0.1:{port}"
        wait_until_ready(self._url)

    def prepare(self, load: Workload) -> None:
        """Generate the updates: one token for each cluster."""
        clusters = {one.cluster: one for one in load.requests}
        asyncio.run(self._send(Workload(list(clusters.values()), 1, load.concurrency)))

    def run(self, load: Workload) -> list[Trace]:
        """See HostedEngine."""
        return asyncio.run(self._send(load))

    async def _send(self, load: Workload) -> list[Trace]:
        waiting = deque(enumerate(load.requests))
        traces = [Trace(0.0, []) for _ in load.requests]
        limits = httpx.Limits(max_connections=load.concurrency)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=600) as http:
            began = time.perf_counter()

            async def client() -> None:
                while waiting:
                    index, request = waiting.popleft()
                    body = completion_body(request, load.output_tokens)
                    await stream(http, body, traces[index], began)

            async with asyncio.TaskGroup() as group:
                for _ in range(load.concurrency):
                    group.create_task(client())
        return traces

    def close(self) -> None:
        """Stop the Ray cluster that this process started."""
        serve.shutdown()
        ray.shutdown()


def completion_body(request: Request, output_tokens: int) -> dict[str, Any]:
    """A streamed greedy completion of exactly `output_tokens`."""
    return {
        "model": MODEL,
        "prompt": request.prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "adaptation": "off" if request.cluster is None else request.cluster,
    }


async def stream(http: httpx.AsyncClient, body: dict[str, Any], trace: Trace, began: float) -> None:
    """Send one request and note when each event with output comes."""
    trace.sent = time.perf_counter() - began
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"the stream ended with {event['error']}")
            if event["choices"]:
                trace.times.append(time.perf_counter() - began)
            if event.get("usage"):
                trace.count = event["usage"]["completion_tokens"]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until_ready(url: str) -> None:
    """Poll `/ready`.

    Raises:
        TimeoutError: the service does not get ready.
    """
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready", timeout=5).text == "ready":
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"the service was not ready after {READY_S} s")


start = Service
