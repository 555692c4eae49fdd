"""GPUs of LM replicas: as many as their engine uses, and each replica's its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster_router.wire.errors import ConfigError
from deploy.app import build
from deploy.config import AppConfig
from deploy.placement import check_gpus, lm_chunks_per_s, lm_niceness
from deploy.serving import Overrides, read_config

ROOT = Path(__file__).parents[2]
SPLIT = {"backend": "vllm", "tensor_parallel": 2}


def settings(engine: dict[str, Any]) -> AppConfig:
    return AppConfig.model_validate({"bundle": None, "engine": engine})


@pytest.mark.parametrize(
    ("engine", "num_gpus"),
    [
        ({}, None),
        ({"backend": "vllm"}, None),
        (SPLIT, 2),
        (SPLIT | {"options": {"pipeline_parallel_size": 2}}, 4),
    ],
)
def test_a_replica_asks_for_the_gpus_that_its_engine_uses(
    engine: dict[str, Any], num_gpus: int | None
) -> None:
    lm = build(settings(engine))._bound_deployment.init_args[1]._bound_deployment
    assert lm.ray_actor_options.get("num_gpus") == num_gpus
    assert lm.ray_actor_options["num_cpus"] == 0.5


@pytest.mark.parametrize("given", [None, 0, 0.25, 1])
def test_an_engine_on_one_device_takes_one_gpu_or_less(given: float | None) -> None:
    check_gpus(settings({}).engine, given)


def test_the_engine_on_a_cpu_alone_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lm_niceness(settings({"device": "cpu"}).engine) == 2
    assert lm_niceness(settings({"backend": "vllm"}).engine) == 0, "it has processes of its own"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert lm_niceness(settings({"device": "cuda"}).engine) == 0


def test_chunks_of_a_replica_beside_its_router_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = AppConfig.model_validate({"bundle": None, "streaming": {"chunks_per_s": 7}})
    assert lm_chunks_per_s(asked) == 7
    assert lm_chunks_per_s(settings({})) == lm_chunks_per_s(settings({"backend": "vllm"})) == 160
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert lm_chunks_per_s(settings({})) == lm_chunks_per_s(settings({"backend": "vllm"})) == 1000
    assert lm_chunks_per_s(settings({"device": "cpu"})) == 160


@pytest.mark.parametrize("given", [0, 2])
def test_a_split_engine_takes_all_of_its_gpus_or_the_cpu(given: float) -> None:
    check_gpus(settings(SPLIT).engine, given)


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ({}, {"num_gpus": 2}, r"num_gpus: 2, its engine uses 1; .* tensor_parallel: 2"),
        ({"backend": "vllm"}, {"num_gpus": 4}, "tensor_parallel: 4"),
        (SPLIT, {"num_gpus": 1}, "num_gpus: 1, its engine uses 2; set num_gpus: 2"),
        (SPLIT, {"num_cpus": 4}, "no num_gpus, its engine uses 2"),
    ],
)
def test_a_config_that_gives_it_others_is_refused(
    engine: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    document = yaml.safe_load((ROOT / "deploy/config.yaml").read_text())
    [application] = document["applications"]
    application["args"]["engine"] = engine
    application["deployments"] = [{"name": "LMReplica", "ray_actor_options": options}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match=words):
        read_config(path, Overrides())


def test_replicas_on_pretended_gpus_see_their_own_and_one_too_many_is_told() -> None:
    configs = ["deploy/multi_gpu.yaml:5", "deploy/tensor_parallel.yaml:3"]
    run = subprocess.run(
        [sys.executable, "tests/deploy/pretended_gpus.py", *configs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    single, pairs = (json.loads(line) for line in run.stdout.splitlines())
    assert single["options"]["num_gpus"] == 1 and pairs["options"]["num_gpus"] == 2
    assert sorted(single["devices"]) == [["0"], ["1"], ["2"], ["3"]]
    assert sorted(map(len, pairs["devices"])) == [2, 2]
    assert sorted(one for pair in pairs["devices"] for one in pair) == ["0", "1", "2", "3"]
    for one in (single, pairs):
        assert '"GPU": ' in one["message"], "what is missing"
