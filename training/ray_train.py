"""A training run under Ray Train: N workers, gradients averaged, the first one's bundle kept."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from cluster_router.wire.errors import SetupError
from training.artefact import Artefact
from training.jobs import TrainJob
from training.modules import AdaptedHead

_BUNDLE = "bundle"


class RayRuntime:
    """The worker that a training function runs in."""

    @property
    def rank(self) -> int:
        """See `Runtime.rank`."""
        return int(ray.train.get_context().get_world_rank())

    def prepare(self, module: AdaptedHead) -> nn.Module:
        """See `Runtime.prepare`: DistributedDataParallel where there are several workers."""
        prepared: nn.Module = ray.train.torch.prepare_model(module)
        return prepared

    def report(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Runtime.report`. A barrier: every worker has to come here."""
        ray.train.report({"stage": stage, "step": step, **metrics})


def train_with_ray(job: TrainJob, storage: Path) -> Artefact:
    """Run `job` in `settings.workers` workers.

    Args:
        job: the run; its features are computed here first, so that workers only read them.
        storage: where Ray Train keeps its own state, on a path that every worker can reach.

    Raises:
        SetupError: a worker failed; the message holds its error.
    """
    job.prepare()
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=job.settings.workers),
        # A run of the same name would be taken for this one and resumed.
        run_config=RunConfig(name=f"head-{uuid.uuid4().hex[:8]}", storage_path=str(storage)),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise SetupError(f"training failed in a worker: {error}") from error
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        return Artefact.load(Path(folder) / _BUNDLE, None)


def _train_worker(config: dict[str, Any]) -> None:
    runtime = RayRuntime()
    artefact = config["job"].run(runtime)
    if runtime.rank != 0:
        ray.train.report({"done": True})
        return
    with tempfile.TemporaryDirectory() as folder:
        artefact.save(Path(folder) / _BUNDLE)
        ray.train.report({"done": True}, checkpoint=Checkpoint.from_directory(folder))
