"""`chameleon train`: settings and data to a bundle in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster_router.wire.errors import BundleError, ConfigError
from training.artefact import Artefact
from training.checkpoints import PartialRun
from training.config import load_settings
from training.data.command import features, location
from training.data.licences import load_licences
from training.jobs import TrainJob
from training.runtime import InProcess


def train_bundle(
    config: Path,
    data: str,
    out: Path,
    holdout: str | None,
    licences: Path | None,
    seed: int | None,
    workers: str | None,
    resume: bool,
    cache: Path | None,
) -> None:
    """Train and write `out`. See the options of the command in `training/cli.py`.

    Raises:
        ChameleonError: `out` exists, or see `TrainJob.run`.
    """
    if out.exists():
        raise BundleError(f"{out} exists; name another folder with --out", "out")
    overrides: dict[str, Any] = {}
    if seed is not None:
        overrides["seed"] = seed
    if workers is not None:
        overrides["workers"] = _workers(workers)
    held_out = None if holdout is None else [name for name in holdout.split(",") if name]
    if held_out is not None:
        overrides["data.holdout"] = held_out
    job = TrainJob(
        load_settings(config, **overrides),
        location(data),
        features(cache),
        "chameleon train",
        load_licences(licences),
        tuple(held_out or ()),
    )
    partial = PartialRun.open(out, job.as_json(), resume)
    _run(job, partial.folder).save(out)
    partial.remove()


def _workers(text: str) -> int | list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"workers: {text!r} is neither N nor N,M", "workers") from None
    return counts[0] if len(counts) == 1 else counts


def _run(job: TrainJob, partial: Path) -> Artefact:
    if job.settings.workers == 0:
        return job.run(InProcess(partial))
    # Ray takes a second to import, and a run in this process does without it.
    from training.ray_train import train_with_ray

    return train_with_ray(job, partial.resolve())
