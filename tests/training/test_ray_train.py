"""A run in two Ray Train workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster_router.wire.errors import SetupError
from training.config import TrainSettings
from training.jobs import EvaluateJob, TrainJob
from training.ray_train import train_with_ray

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of this test's own, unless the session has one already."""
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def _job(settings: TrainSettings, data: Path, tmp_path: Path, workers: int) -> TrainJob:
    several = settings.model_copy(update={"workers": workers})
    return TrainJob(several, data, tmp_path / "cache", "a test")


def test_two_workers_train_one_bundle(settings: TrainSettings, data: Path, tmp_path: Path) -> None:
    artefact = train_with_ray(_job(settings, data, tmp_path, workers=2), tmp_path / "ray")
    assert artefact.settings.workers == 2
    artefact.save(tmp_path / "bundle")
    figures = EvaluateJob(tmp_path / "bundle", data, tmp_path / "cache").run()
    assert figures["seen"]["mean"]["gains"]["over_base"][1] > 0.5


def test_a_failing_worker_ends_the_run_with_its_own_message(
    settings: TrainSettings, data: Path, tmp_path: Path
) -> None:
    clusters = settings.clusters.model_copy(update={"count": 10_000})
    job = _job(settings.model_copy(update={"clusters": clusters}), data, tmp_path, 1)
    with pytest.raises(SetupError, match=r"clusters\.count"):
        train_with_ray(job, tmp_path / "ray")
