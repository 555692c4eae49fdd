"""Where clusters are kept, and when there is a learner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ray.serve.deployment import Application

from adapter_gen.bundle import Bundle
from cluster_router.wire.errors import ConfigError
from deploy.app import build
from deploy.config import AppConfig, LearningConfig
from deploy.learning import LearnerReplica, clusters_uri


@pytest.fixture(scope="module")
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.load(bundle_path, None)


def learner(**settings: object) -> Application | None:
    """What the router is bound to as its learner."""
    built = build(AppConfig.model_validate(settings))
    bound: Application | None = built._bound_deployment.init_args[3]
    return bound


def test_there_is_a_learner_where_there_is_something_to_move() -> None:
    bound = learner()
    assert bound is not None
    deployment = bound._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("CentroidLearner", 1)
    assert learner(learner={"enabled": False}) is None
    assert learner(bundle=None) is None


def test_each_bundle_has_a_folder_of_its_own(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path))
    name = f"{bundle.hypernetwork_id}-{bundle.clusters_id}"
    assert clusters_uri(LearningConfig(), bundle) == f"{tmp_path}/clusters/{name}"
    elsewhere = LearningConfig(uri="s3://bucket/clusters/")
    assert clusters_uri(elsewhere, bundle) == f"s3://bucket/clusters/{name}"
    start = bundle.snapshot
    moved = replace(bundle, snapshot=replace(start, threshold=start.threshold / 2))
    reweighted = replace(bundle, token_weights=np.ones_like(bundle.token_weights))
    assert len({clusters_uri(elsewhere, one) for one in (bundle, moved, reweighted)}) == 3


async def test_a_learner_needs_a_bundle() -> None:
    with pytest.raises(ConfigError, match="set `bundle`"):
        LearnerReplica(AppConfig(bundle=None))
