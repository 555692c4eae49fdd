"""Command line: `python -m training <command>`; `--help` lists the commands."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster_router.wire.errors import BundleError, ChameleonError
from lm_workers.models.source import default_cache
from training.artefact import Artefact
from training.checkpoints import PartialRun
from training.config import load_settings
from training.data.command import DATA_HELP, location
from training.data.command import add_parser as add_data
from training.data.licences import LICENCES_HELP, load_licences
from training.evaluation.command import add_parser as add_evaluate
from training.evaluation.seeds import add_parser as add_seeds
from training.jobs import TrainJob
from training.paper.command import add_parser as add_reproduce_paper
from training.runtime import InProcess

_FAILED = 2
"""Exit status of a run that the operator has to change something for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ChameleonError as error:
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("interrupted; train goes on with --resume, evaluate when run again", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    train = commands.add_parser("train", help="train a bundle from a folder of text")
    train.add_argument("--config", type=Path, required=True, help="settings, YAML")
    train.add_argument("--out", type=Path, default=Path("bundle"), help="folder to write")
    train.add_argument("--holdout", help="domains to hold out, separated by commas")
    train.add_argument("--licences", type=Path, help=LICENCES_HELP)
    train.add_argument("--seed", type=int, help="replaces the seed of the config")
    train.add_argument(
        "--workers",
        type=_workers,
        metavar="N[,M]",
        help="replaces the workers of the config: 0 for this process, N Ray Train workers, "
        "or from N to M of them, as many as the cluster has room for",
    )
    train.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run of --out, if any"
    )
    train.set_defaults(run=_train)
    for command in (train, add_evaluate(commands), add_data(commands)):
        command.add_argument("--data", type=location, required=True, help=DATA_HELP)
        command.add_argument(
            "--cache",
            type=Path,
            default=default_cache() / "features",
            help="where computed features are kept (default: %(default)s)",
        )
    add_seeds(commands)
    add_reproduce_paper(commands)
    return parser


def _train(options: argparse.Namespace) -> None:
    if options.out.exists():
        raise BundleError(f"{options.out} exists; name another folder with --out", "out")
    overrides: dict[str, Any] = {
        name: value
        for name, value in (("seed", options.seed), ("workers", options.workers))
        if value is not None
    }
    if options.holdout:
        overrides["data.holdout"] = options.holdout.split(",")
    settings = load_settings(options.config, **overrides)
    job = TrainJob(
        settings,
        options.data,
        options.cache.resolve(),
        "python -m training train",
        load_licences(options.licences),
    )
    partial = PartialRun.open(options.out, job.as_json(), options.resume)
    _run(job, partial.folder).save(options.out)
    partial.remove()
    print(
        f"wrote {options.out}; measure it with: "
        f"python -m training evaluate --bundle {options.out} --data {options.data}"
    )


def _workers(text: str) -> int | list[int]:
    counts = [int(part) for part in text.split(",")]
    return counts[0] if len(counts) == 1 else counts


def _run(job: TrainJob, partial: Path) -> Artefact:
    if job.settings.workers == 0:
        return job.run(InProcess(partial))
    # Ray takes a second to import, and a run in this process does without it.
    from training.ray_train import train_with_ray

    return train_with_ray(job, partial.resolve())
