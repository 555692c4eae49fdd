"""The application that is struck, overrun, left and replaced."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from reliability.bundles import write_bundle

from deploy.app import build
from deploy.config import AppConfig
from lm_workers.engine import EngineStats

APP = MODEL = "faults"
CAPACITY = 2 * (4 + 8)  # of both replicas: running and waiting


@dataclass(frozen=True)
class Struck:
    """The application. `deploy` replaces its settings as a new config file would."""

    url: str
    clusters: Path
    bundle: Path
    model: Path

    def body(self, **fields: Any) -> dict[str, Any]:
        """A request whose prompt no other has."""
        prompt = f"hello {next(_NUMBERS)}"
        return {"model": MODEL, "prompt": prompt, "max_tokens": 16, "ignore_eos": True} | fields

    def config(self, **settings: Any) -> AppConfig:
        engine = {"dtype": "float32", "max_sequences": 4, "max_queued": 8, "max_batch_tokens": 64}
        return AppConfig.model_validate(
            {
                "model": str(self.model),
                "served_name": MODEL,
                "bundle": str(self.bundle),
                "generator": {"patience_s": 2},
                "learner": {
                    "uri": str(self.clusters),
                    "publish_interval_s": 0.5,
                    "poll_interval_s": 0.3,
                    "clusters": {"interval": 16, "min_size": 4},
                },
                "engine": engine | {"kernels": "reference", "cpu_threads": 1},
            }
            | settings
        )

    def deploy(self, **settings: Any) -> None:
        application = build(self.config(**settings))
        lm = application._bound_deployment.init_args[1]
        lm._bound_deployment = lm._bound_deployment.options(
            num_replicas=2, ray_actor_options={"num_cpus": 0.1}
        )
        serve.run(application, name=APP, route_prefix=f"/{APP}")


def integrity() -> list[EngineStats]:
    """What each LM replica holds, once it has made sure that nothing is lost or held twice."""
    handle = serve.get_deployment_handle("LMReplica", APP)
    return handle.broadcast("check_integrity").results(timeout_s=60)


_NUMBERS = itertools.count()
ASKED_FOR = pytest.mark.skipif(
    os.environ.get("CHAMELEON_FAULTS") != "1",
    reason="kills processes and overruns the service for ten minutes; set CHAMELEON_FAULTS=1",
)


@pytest.fixture(scope="package")
def struck(
    service: Any,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Struck]:
    root = tmp_path_factory.mktemp("faults")
    model = root / "model"
    shutil.copytree(tiny_llama, model)
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 8192}))
    write_bundle(model, root / "bundle", seed=0)
    one = Struck(f"{service.url}/{APP}", root / "clusters", root / "bundle", model)
    one.deploy()
    yield one
    serve.delete(APP)
