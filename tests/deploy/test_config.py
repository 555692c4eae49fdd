from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cluster_router.wire.errors import BundleError, ConfigError, ModelError
from deploy.app import build
from deploy.config import SHIPPED, AppConfig
from deploy.generator import GeneratorReplica
from deploy.lm import LMReplica

ROOT = Path(__file__).parents[2]
DEFAULT = "smollm2-135m-instruct"


def test_the_shipped_config_is_valid_and_names_real_deployments() -> None:
    config = yaml.safe_load((ROOT / "deploy/config.yaml").read_text())
    [app] = config["applications"]
    settings = AppConfig.model_validate(app["args"])
    assert settings.bundle_path == SHIPPED / DEFAULT
    built = build(settings)
    names = {deployment["name"] for deployment in app["deployments"]}
    assert names <= {"ClusterRouter", "LMReplica", "AdapterGenerator", "CentroidLearner"}
    assert built._bound_deployment.name == "ClusterRouter"


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"modle": "x"}, "modle"),
        ({"engine": {"max_sequence": 4}}, "max_sequence"),
        ({"engine": {"max_sequences": 0}}, "max_sequences"),
        ({"engine": {"max_sequences": 600}}, "max_batch_tokens"),
        ({"engine": {"dtype": "int3"}}, "dtype"),
        ({"engine": {"tensor_parallel": 2}}, "tensor_parallel"),
        ({"router": {"index_device": "tpu"}}, "index_device"),
        ({"model": ""}, "model"),
        ({"access": {"key": "x"}}, "key"),
        ({"access": {"max_body_bytes": 0}}, "max_body_bytes"),
        ({"refinement": {"namespaces": "*"}}, "namespaces"),
        ({"refinement": {"refinery": {"every": 1}}}, "every"),
        ({"learner": {"enable": False}}, "enable"),
        ({"learner": {"uri": ""}}, "uri"),
        ({"learner": {"publish_interval_s": 0}}, "publish_interval_s"),
        ({"learner": {"batch_size": 64, "buffer_size": 63}}, "buffer_size must hold a batch"),
        ({"learner": {"max_namespaces": 0}}, "max_namespaces"),
        ({"learner": {"clusters": {"min_sizes": 4}}}, "min_sizes"),
        ({"learner": {"clusters": {"window": 4}}}, "window must hold"),
    ],
)
def test_settings_that_do_not_exist_or_fit_are_refused(settings: dict, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        AppConfig.model_validate(settings)


def test_a_bundle_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"'nothing' is neither .*smollm2.*null"):
        build(AppConfig(bundle="nothing"))


def test_without_a_bundle_nothing_generates() -> None:
    assert AppConfig(bundle=None).bundle_path is None


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing"):
        LMReplica(AppConfig(model=str(tmp_path / "missing"), bundle=None), None)


def damage(path: Path, how: str) -> None:
    weights = path / "hypernetwork.safetensors"
    data = bytearray(weights.read_bytes())
    if how == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[-1] ^= 0xFF
        weights.write_bytes(data)
    elif how == "missing":
        weights.unlink()
    else:
        manifest = path / "bundle.json"
        manifest.write_text(manifest.read_text().replace('"fingerprint": "', '"fingerprint": "0'))


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "of another base"])
def test_a_bundle_that_cannot_be_used_stops_the_replica(
    how: str, tmp_path: Path, bundle_path: Path, default_model: Path
) -> None:
    copy = Path(shutil.copytree(bundle_path, tmp_path / "bundle"))
    damage(copy, how)
    with pytest.raises(BundleError, match="bundle"):
        GeneratorReplica(AppConfig(bundle=str(copy)))


def test_the_context_must_fit_in_the_cache(default_model: Path) -> None:
    config = AppConfig.model_validate({"bundle": None, "engine": {"kv_cache_tokens": 1000}})
    with pytest.raises(ConfigError, match="raise kv_cache_tokens or lower max_context"):
        LMReplica(config, None)


def test_cuda_without_a_device() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    config = AppConfig.model_validate({"bundle": None, "engine": {"device": "cuda"}})
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        LMReplica(config, None)
