"""A training run under Ray Train: any number of workers, checkpoints, another try after a failure.

Ray starts the workers, joins them by gloo (or nccl on GPUs), keeps the checkpoints they report and
starts them again from the last one when any dies or, where `workers` is a range, when the cluster
grows or shrinks.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor, nn

from cluster_router.wire.errors import ConfigError, ModelError, SetupError
from training.artefact import Artefact
from training.checkpoints import Saved, StageFiles
from training.config import TrainSettings
from training.jobs import TrainJob

_BUNDLE = "bundle"
_RUN = "run"
"""Ray's name for the run: one that is there already is gone on with."""
_KEPT = 2
"""Checkpoints kept: the last one, and one in case that is cut off while it is written."""


class RayRuntime:
    """The worker that a training function runs in; see `training.runtime.Runtime`.

    Args:
        folder: of this worker alone; it is filled with the last checkpoint.
        checkpoints: where Ray keeps them.
    """

    def __init__(self, folder: Path, checkpoints: Path) -> None:
        context = ray.train.get_context()
        self.rank = int(context.get_world_rank())
        self.world = int(context.get_world_size())
        self.device: torch.device = ray.train.torch.get_device()
        self.checkpoints = checkpoints
        self._files = StageFiles(folder)
        last = ray.train.get_checkpoint()
        if last is not None:
            last.to_directory(folder)

    def prepare(self, module: nn.Module) -> nn.Module:
        """See `Runtime.prepare`: DistributedDataParallel where there are several workers."""
        # Buffers never change in training, and the frozen LM head is one of them.
        kwargs = {"broadcast_buffers": False}
        prepared: nn.Module = ray.train.torch.prepare_model(module, parallel_strategy_kwargs=kwargs)
        return prepared

    def total(self, value: Tensor) -> Tensor:
        """See `Runtime.total`."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value

    def load(self, stage: str) -> Saved | None:
        """See `Runtime.load`."""
        return self._files.load(stage)

    def save(self, stage: str, saved: Saved, metrics: Mapping[str, float]) -> None:
        """See `Runtime.save`."""
        if self.rank == 0:
            self._files.save(stage, saved)
        self._report({"stage": stage, **metrics})

    def finish(self, artefact: Artefact) -> None:
        """Keep the result beside the stages."""
        folder = self._files.folder / _BUNDLE
        if self.rank == 0 and not folder.exists():
            artefact.save(folder)
        self._report({"stage": _BUNDLE})

    def _report(self, metrics: dict[str, Any]) -> None:
        first = self.rank == 0
        checkpoint = Checkpoint.from_directory(self._files.folder) if first else None
        ray.train.report(metrics, checkpoint=checkpoint)


def train_with_ray(job: TrainJob, storage: Path) -> Artefact:
    """Run `job` in `settings.workers` workers, from the last checkpoint in `storage` if any.

    Args:
        job: the run; its features are computed here first, so that workers only read them.
        storage: where Ray Train keeps checkpoints, on a path that every worker can reach.

    Raises:
        SetupError: the run cannot succeed as it is set up, or workers failed more than
            `max_failures` times; the message holds the error.
        KeyboardInterrupt: the run was interrupted; its checkpoints are kept.
    """
    job.prepare()
    if not ray.is_initialized():
        ray.init()
    settings = job.settings
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "checkpoints": storage / _RUN},
        scaling_config=scaling(settings, int(ray.cluster_resources().get("GPU", 0))),
        run_config=RunConfig(
            name=_RUN,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=_KEPT),
        ),
    )
    result = _fit(trainer, storage)
    if isinstance(result.return_value, SetupError):
        raise result.return_value
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        return Artefact.load(Path(folder) / _BUNDLE, None)


def _fit(trainer: TorchTrainer, storage: Path) -> Result:
    handler = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise SetupError(
            f"training failed in a worker: {error}; go on with --resume from {storage}"
        ) from error
    except SystemExit as end:  # how Ray's own handler of Ctrl-C ends, with status 0
        raise KeyboardInterrupt from end
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Ray leaves its own behind


def scaling(settings: TrainSettings, gpus: int) -> ScalingConfig:
    """How many workers, each with what; with a GPU if the cluster's `gpus` are not 0.

    Raises:
        ConfigError: there are GPUs, but fewer than workers.
    """
    least = settings.workers if isinstance(settings.workers, int) else settings.workers[0]
    if 0 < gpus < least:
        raise ConfigError(
            f"{least} workers need a GPU each and the cluster has {gpus}; lower workers", "workers"
        )
    resources = {"CPU": settings.worker_cpus}
    if gpus:
        resources["GPU"] = 1
    return ScalingConfig(
        num_workers=settings.workers, use_gpu=gpus > 0, resources_per_worker=resources
    )


def _train_worker(config: dict[str, Any]) -> SetupError | None:
    """What each worker runs; returns the error of a run that another try would not help."""
    with tempfile.TemporaryDirectory() as folder:
        runtime = RayRuntime(Path(folder), config["checkpoints"])
        try:
            runtime.finish(config["job"].run(runtime))
        except ModelError:
            raise  # this machine may be the only one that cannot reach the model
        except SetupError as error:
            # Settings, data and NaN are the same in every worker, so all of them end here.
            return error
    return None
