"""The LM replica: where its engine is built, and how it sends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from deploy import lm
from deploy.config import AppConfig
from deploy.lm import LMReplica
from lm_workers.build import build_engine

ENGINE = {"device": "cpu", "dtype": "float32", "kernels": "reference", "cpu_threads": 1}
BACKENDS = [(ENGINE, True), ({"backend": "vllm"}, False)]


PROGRAM = """
import asyncio, os, sys
import ray.serve
from deploy.config import AppConfig
from deploy.lm import LMReplica
from lm_workers.models import DEFAULT_MODEL

async def threads(bundle):
    engine = {"cpu_threads": 2, "max_context": 64, "kv_cache_tokens": 512}
    config = AppConfig(model=sys.argv[1], bundle=bundle, engine=engine)
    before = len(os.listdir("/proc/self/task"))
    replica = LMReplica(config, None)
    await asyncio.sleep(0.5)
    return len(os.listdir("/proc/self/task")) - before

asyncio.run(threads(None))  # what comes with the first engine, whatever it serves
print(asyncio.run(threads(None)), asyncio.run(threads(DEFAULT_MODEL)))
"""


@pytest.mark.parametrize(("engine", "passing"), BACKENDS)
async def test_only_the_built_in_engine_is_built_in_a_thread_that_ends(
    engine: dict[str, Any], passing: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builders: list[threading.Thread] = []

    def build(path: Path, *_: object) -> Any:
        builders.append(threading.current_thread())
        own = AppConfig.model_validate({"engine": ENGINE | {"kv_cache_tokens": 512}}).engine
        return build_engine(path, own)

    monkeypatch.setattr(lm, "build_engine", build)
    config = {"model": str(tiny_llama), "bundle": None, "engine": engine}
    replica = LMReplica(AppConfig.model_validate(config | {"streaming": {"chunks_per_s": 7}}), None)
    replica._worker.close()
    [builder] = builders
    assert builder.is_alive() is not passing
    assert replica._worker._streams._chunks_per_s == 7


def test_a_bundle_leaves_no_team_of_threads_behind(default_model: Path) -> None:
    """With one more than cores, those of the engine would sleep after each loop."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(default_model)],
        capture_output=True, text=True, check=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    without, adapted = map(int, done.stdout.split())
    assert adapted == without
