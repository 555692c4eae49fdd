"""The real application on a Ray cluster of its own, for as long as a bench runs."""

from __future__ import annotations

import reliability.environment  # noqa: F401  # before Ray

# isort: split
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from deploy.app import build
from deploy.config import AppConfig

APP = "chameleon"
MODEL = "smollm2-135m-instruct"
TOPICS = (
    "Write an SQL query that counts orders by country and month.",
    "I was charged twice for one transfer. How do I get my money back?",
    "Slice the onions and fry them in butter until they are golden.",
    "1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. Ba4 Nf6 5. O-O Be7",
)


@dataclass(frozen=True)
class Settings:
    """What a bench serves: the default model and its bundle, on as little as it needs."""

    max_sequences: int = 8
    max_queued: int = 8
    max_context: int = 512
    lm_replicas: int = 1
    routers: int = 1
    threads: int = 1

    def config(self, clusters: str) -> AppConfig:
        return AppConfig.model_validate(
            {
                "engine": {
                    "dtype": "float32",
                    "max_context": self.max_context,
                    "max_sequences": self.max_sequences,
                    "max_queued": self.max_queued,
                    "kv_cache_tokens": self.max_context * self.max_sequences,
                    "cpu_threads": self.threads,
                },
                "learner": {"uri": clusters},
            }
        )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(settings: Settings) -> Iterator[str]:
    """Its URL."""
    port = free_port()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as clusters:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            application = build(settings.config(clusters))
            router = application._bound_deployment
            lm = router.init_args[1]
            lm._bound_deployment = lm._bound_deployment.options(num_replicas=settings.lm_replicas)
            application._bound_deployment = router.options(num_replicas=settings.routers)
            serve.run(application, name=APP)
            yield f"http://127.0.0.1:{port}"
            serve.shutdown()
    finally:
        ray.shutdown()


def body(number: int, max_tokens: int) -> dict[str, Any]:
    """The body of request `number`; no two have one prompt."""
    return {
        "model": MODEL,
        "prompt": f"{number}. {TOPICS[number % len(TOPICS)]}",
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }
