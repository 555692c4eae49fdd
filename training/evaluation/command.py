"""`python -m training evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from training.evaluation.job import EvaluateJob
from training.evaluation.settings import (
    VARIANTS,
    EvaluateSettings,
    load_evaluate_settings,
)
from training.evaluation.tables import table


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Register the command; its `--data` and `--cache` are added where the others' are."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="measure a bundle against every baseline and control",
        description="Measures a bundle and writes evaluation.json, report.md, documents.jsonl and "
        "plots. What was computed is kept in --cache: the same command goes on where it was "
        "stopped. Domains that the bundle was not trained on arrive as a stream.",
        epilog=f"Variants: {', '.join(VARIANTS)}.",
    )
    parser.add_argument("--bundle", type=Path, required=True, help="folder that train wrote")
    parser.add_argument("--out", type=Path, help="folder to write (default: <bundle>-evaluation)")
    parser.add_argument("--settings", type=Path, help="settings of the evaluation, YAML")
    parser.add_argument("--quick", action="store_true", help="few documents, cheap variants")
    parser.add_argument("--documents", type=int, help="scored documents of each domain")
    parser.add_argument(
        "--expensive-documents", type=int, help="of these, how many expensive variants get"
    )
    parser.add_argument("--variants", help="which to measure, separated by commas (default: all)")
    parser.add_argument("--seed", type=int, help="of arrival order, controls and bootstrap")
    parser.add_argument("--paper", type=Path, help="a bundle of the paper's form, to compare with")
    parser.add_argument(
        "--budget",
        type=Path,
        help="a bundle trained on the same tokens, whose static update has the whole budget",
    )
    parser.add_argument(
        "--holdout", type=Path, help="an evaluated bundle of the same recipe with domains held out"
    )
    parser.add_argument(
        "--record", action="store_true", help="write figures and card into the bundle too"
    )
    parser.set_defaults(run=evaluate)
    return parser


def evaluate(options: argparse.Namespace) -> None:
    """Measure, write, and print the table of every group.

    Raises:
        ChameleonError: see `EvaluateJob.run`.
    """
    bundle = options.bundle.resolve()
    out = options.out or bundle.with_name(f"{bundle.name}-evaluation")
    job = EvaluateJob(
        bundle=bundle,
        data=options.data,
        cache=options.cache.resolve(),
        out=out,
        settings=_settings(options),
        holdout=options.holdout,
        paper=options.paper,
        budget=options.budget,
        record=options.record,
    )
    for name, figures in job.run().items():
        if name != "protocol":
            print(f"\n{name}\n{table(figures)}")
    print(f"\nwrote {out}/report.md")


def _settings(options: argparse.Namespace) -> EvaluateSettings:
    chosen = None if options.variants is None else tuple(options.variants.split(","))
    settings = load_evaluate_settings(options.settings, seed=options.seed)
    if options.quick:
        settings = settings.quick()
    overrides = {
        "documents": options.documents,
        "expensive_documents": options.expensive_documents,
        "variants": chosen,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    return EvaluateSettings.model_validate(settings.model_dump() | given)
