"""`chameleon evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.data.command import features, location
from training.evaluation.job import EvaluateJob
from training.evaluation.settings import checked_settings, load_evaluate_settings
from training.evaluation.tables import table


def evaluate_bundle(
    bundle: Path,
    data: str,
    cache: Path | None,
    out: Path | None,
    settings: Path | None,
    *,
    quick: bool,
    seed: int | None,
    variants: str | None,
    counts: Mapping[str, int],
    holdout: Path | None,
    budget: Path | None,
    record: bool,
) -> None:
    """Measure, write, and print the table of every group.

    See the options of the command in `training/cli.py`; `counts` replace those of `settings`.

    Raises:
        ChameleonError: see `EvaluateJob.run`.
    """
    bundle = bundle.resolve()
    out = out or bundle.with_name(f"{bundle.name}-evaluation")
    chosen = load_evaluate_settings(settings, seed=seed)
    if quick:
        chosen = chosen.quick()
    given: dict[str, Any] = dict(counts)
    if variants is not None:
        given["variants"] = tuple(variants.split(","))
    job = EvaluateJob(
        bundle=bundle,
        data=location(data),
        cache=features(cache),
        out=out,
        settings=checked_settings(chosen.model_dump() | given),
        holdout=holdout,
        budget=budget,
        record=record,
    )
    for name, figures in job.run().items():
        if name != "protocol":
            print(f"\n{name}\n{table(figures)}")
    print(f"\nwrote {out}/report.md")
