"""The LM replica: where its engine is built, and how it sends."""

from __future__ import annotations

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
    assert replica._worker._chunks_per_s == 7
