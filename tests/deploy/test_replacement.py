"""Another base model under one application's name: refused before anything stops, or kept apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from adapter_gen.bundle import Bundle
from cluster_router.wire.errors import BundleError, UnavailableError
from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest
from deploy.app import build
from deploy.config import AppConfig
from deploy.learning import LearnerReplica, clusters_name
from deploy.lm import LMReplica
from lm_workers.models import describe_model

ENGINE = {"dtype": "float32", "kernels": "reference", "cpu_threads": 1, "kv_cache_tokens": 512}
REQUEST = TokenizedRequest("r", (5, 6), SamplingParams(max_tokens=2), Assignment(key=None))


def test_a_bundle_of_another_model_is_refused_while_the_old_application_runs_on(
    tiny_llama: Path,
) -> None:
    with pytest.raises(BundleError, match=r"not to the base model being served .* choose the"):
        build(AppConfig(model=str(tiny_llama)))


def test_so_is_a_damaged_one_though_the_model_is_elsewhere(
    tmp_path: Path, bundle_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle_path, tmp_path / "bundle"))
    config = AppConfig(model=str(tmp_path / "on another node"), bundle=str(copy))
    build(config)
    (copy / "hypernetwork.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="hypernetwork"):
        build(config)


async def test_an_lm_replica_reads_no_tokens_of_another_model(
    tiny_checkpoints: dict[str, Path],
) -> None:
    ours, other = (
        describe_model(tiny_checkpoints[name], name).fingerprint for name in ("llama", "qwen3")
    )
    config = {"model": str(tiny_checkpoints["llama"]), "bundle": None, "engine": ENGINE}
    replica = LMReplica(AppConfig.model_validate(config), None)
    try:
        assert (await replica.record_routing_stats())["base"] == ours
        answer = [chunk async for chunk in replica.generate(REQUEST, base=ours)]
        assert answer[-1].finish_reason == "length"
        with pytest.raises(UnavailableError, match=f"{other}.* serves {ours}.* name and route"):
            await anext(replica.generate(REQUEST, base=other))
    finally:
        replica._worker.close()


async def test_a_learner_learns_nothing_of_other_clusters(
    tmp_path: Path, bundle_path: Path
) -> None:
    bundle = Bundle.load(bundle_path, None)
    learner = LearnerReplica(AppConfig.model_validate({"learner": {"uri": str(tmp_path)}}))
    prompts = [("", np.eye(1, bundle.snapshot.dim, dtype=np.float32))]
    await learner.learn(prompts, clusters_name(bundle))
    with pytest.raises(UnavailableError, match="prompts of the clusters other are not for"):
        await learner.learn(prompts, "other")
    assert (await learner.status()).learned == 1
