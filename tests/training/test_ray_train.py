"""Runs in Ray Train workers: the same curve as in this process, whatever happens to the workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from cluster_router.wire.errors import ConfigError
from training.artefact import Artefact
from training.checkpoints import StageFiles
from training.config import TrainSettings
from training.jobs import TrainJob
from training.ray_train import scaling, train_with_ray
from training.runtime import InProcess

pytestmark = pytest.mark.serve
STAGES = ("static", "hyper")
MARK = 12345.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster of this test's own, unless the session has one already."""
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def job(settings: TrainSettings, data: Path, cache: Path) -> TrainJob:
    """A run that reports often, in two workers."""
    changes = {"steps": 120, "evaluate_every": 10, "patience": 100}
    several = settings.model_copy(
        update={
            "workers": 2,
            "static": settings.static.model_copy(update=changes),
            "hyper": settings.hyper.model_copy(update=changes | {"steps": 40}),
        }
    )
    return TrainJob(several, data, cache, "a test")


@pytest.fixture(scope="module")
def undisturbed(job: TrainJob) -> Artefact:
    """The same run in one worker: this process."""
    return job.run(InProcess())


def _assert_same_run(artefact: Artefact, expected: Artefact) -> None:
    for stage in STAGES:
        got, wanted = artefact.record[stage], expected.record[stage]
        assert got["best_loss"] == pytest.approx(wanted["best_loss"], rel=2e-3)
        assert len(got["curve"]) == len(wanted["curve"]) >= 4
        for point, reference in zip(got["curve"], wanted["curve"], strict=True):
            # Sums over two halves are rounded otherwise than sums over the whole, and what comes
            # before the head is rounded to bfloat16.
            assert point == pytest.approx(reference, rel=2e-3)
    assert artefact.record["hyper"]["best_loss"] < artefact.record["static"]["curve"][0][2] - 0.1


class OnFirstCheckpoint(threading.Thread):
    """Does something once, as soon as Ray knows of a checkpoint in `storage`."""

    def __init__(self, storage: Path, action: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._storage = storage
        self._action = action
        self.acted = False

    def run(self) -> None:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            if any(self._storage.glob("run/checkpoint_manager_snapshot.json")):
                self._action()
                self.acted = True
                return
            time.sleep(0.02)


def _kill_a_worker() -> None:
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(workers) == 2
    workers[0].kill()


def _mark(storage: Path) -> int:
    """Write a figure into every checkpoint that only a resumed run can know; the latest step.

    Every one, because Ray may not yet have known of the newest when it was interrupted.
    """
    steps = 0
    for folder in storage.glob("run/checkpoint_2*"):
        files = StageFiles(folder)
        saved = files.load("static")
        assert saved is not None
        saved.record["curve"][0][1] = MARK
        files.save("static", saved)
        steps = max(steps, int(saved.record["steps"]))
    return steps


def test_two_workers_give_the_curve_of_one_and_survive_a_kill(
    job: TrainJob, undisturbed: Artefact, tmp_path: Path
) -> None:
    killer = OnFirstCheckpoint(tmp_path, _kill_a_worker)
    killer.start()
    artefact = train_with_ray(job, tmp_path)
    assert killer.acted
    _assert_same_run(artefact, undisturbed)


def test_an_interrupted_run_goes_on_with_as_many_workers_as_there_is_room_for(
    job: TrainJob, undisturbed: Artefact, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)
    stopper = OnFirstCheckpoint(tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        train_with_ray(job, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    steps = _mark(tmp_path)
    assert 0 < steps < job.settings.static.steps
    elastic = job.settings.model_copy(update={"workers": (1, 2)})
    resumed = train_with_ray(TrainJob(elastic, job.data, job.cache, "a test"), tmp_path)
    assert resumed.record["static"]["curve"][0][1] == MARK
    resumed.record["static"]["curve"][0] = undisturbed.record["static"]["curve"][0]
    _assert_same_run(resumed, undisturbed)


def test_a_run_that_cannot_succeed_is_tried_once_and_says_why(
    job: TrainJob, tmp_path: Path
) -> None:
    clusters = job.settings.clusters.model_copy(update={"count": 10_000})
    impossible = job.settings.model_copy(update={"clusters": clusters})
    with pytest.raises(ConfigError, match=r"clusters\.count"):
        train_with_ray(TrainJob(impossible, job.data, job.cache, "a test"), tmp_path)


def test_a_range_of_workers_is_elastic_and_each_takes_a_gpu_where_there_are_any(
    settings: TrainSettings,
) -> None:
    fixed = scaling(settings.model_copy(update={"workers": 2, "worker_cpus": 3}), 0)
    assert (fixed.num_workers, fixed.elasticity_enabled, fixed.use_gpu) == (2, False, False)
    assert fixed.resources_per_worker == {"CPU": 3}
    ranged = settings.model_copy(update={"workers": (1, 4)})
    elastic = scaling(ranged, 1)
    assert (elastic.min_workers, elastic.max_workers) == (1, 4)
    assert elastic.elasticity_enabled and elastic.use_gpu
    with pytest.raises(ConfigError, match="2 workers need a GPU each"):
        scaling(settings.model_copy(update={"workers": 2}), 1)
