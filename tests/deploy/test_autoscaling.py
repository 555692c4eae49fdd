"""Replicas wanted for a load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deploy.autoscaling import LoadPolicy
from deploy.config import AppConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
TARGETS = {"tokens": 1000, "kv_use": 0.5}


def wanted(metrics: dict[str, dict[str, float]] | None) -> float:
    context = SimpleNamespace(aggregated_metrics=metrics, policy_state={"kept": 1})
    count, state = LoadPolicy(TARGETS)(context)
    assert state == {"kept": 1}
    return count


def test_the_metric_that_needs_most_decides() -> None:
    assert wanted({"tokens": {"a": 2500, "b": 500}, "kv_use": {"a": 0.2, "b": 0.1}}) == 3
    assert wanted({"tokens": {"a": 100}, "kv_use": {"a": 0.9, "b": 0.85}}) == 3.5


@pytest.mark.parametrize("metrics", [None, {}, {"tokens": {}}, {"tokens": {"a": 0.0}}])
def test_one_replica_where_nothing_is_to_do(metrics: Any) -> None:
    assert wanted(metrics) == 1


@pytest.mark.parametrize("targets", [{}, {"tokes": 5}, {"tokens": 0}, {"tokens": float("nan")}])
def test_targets_that_mean_nothing_are_refused(targets: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="targets"):
        LoadPolicy(targets)


def test_the_multi_gpu_config_is_one_that_serve_and_we_accept() -> None:
    config = yaml.safe_load((DEPLOY / "multi_gpu.yaml").read_text())
    [application] = ServeDeploySchema.model_validate(config).applications
    AppConfig.model_validate(application.args)
    scaled = {}
    for one in config["applications"][0]["deployments"]:
        policy = AutoscalingConfig.model_validate(one["autoscaling_config"]).policy
        if "LoadPolicy" in str(policy.policy_function):
            scaled[one["name"]] = LoadPolicy(**policy.policy_kwargs)
    assert set(scaled) == {"LMReplica", "AdapterGenerator"}
    [lm] = [one for one in application.deployments if one.name == "LMReplica"]
    assert lm.ray_actor_options.num_gpus == 1
