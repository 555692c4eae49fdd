"""The training commands, of `chameleon` and of `python -m training`.

Only the command lines are here. What they run is imported when it is run, so that `--help` and
completion need neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from training.terminal import command_line, interruptible, run

_PANEL = "Train"
app = command_line("Train and measure bundles.")

_DATA_HELP = (
    "Folder of text by domain (DOMAIN.SPLIT.jsonl.gz, DOMAIN.jsonl, DOMAIN.parquet, "
    "DOMAIN/*.txt), or hub:ORGANISATION/DATASET, with :CONFIGURATION where it has several."
)
_LICENCES_HELP = (
    "YAML file of the source and licence of each domain, for the model card: "
    "DOMAIN: {source, licence, note}."
)
_CACHE_HELP = "Where computed features are kept (default: features/ in this user's cache)."

Data = Annotated[str, typer.Option(help=_DATA_HELP)]
Cache = Annotated[Path | None, typer.Option(help=_CACHE_HELP)]
Licences = Annotated[Path | None, typer.Option(help=_LICENCES_HELP)]


# Bundles that `evaluate` compares with.
_BUDGET_HELP = "A bundle trained on the same tokens, whose static update has the whole budget."
_HOLDOUT_HELP = "An evaluated bundle of the same recipe with domains held out."
BudgetBundle = Annotated[Path | None, typer.Option(help=_BUDGET_HELP)]
HoldoutBundle = Annotated[Path | None, typer.Option(help=_HOLDOUT_HELP)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    return run(app, "python -m training", arguments)


@app.command(rich_help_panel=_PANEL)
def train(
    config: Annotated[Path, typer.Option(help="Settings, YAML.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("bundle"),
    holdout: Annotated[
        str | None,
        typer.Option(
            help="Domains to hold out, separated by commas, in place of the config's; '' holds out "
            "none."
        ),
    ] = None,
    licences: Licences = None,
    seed: Annotated[int | None, typer.Option(help="Replaces the seed of the config.")] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N or N,M",
            help="Replaces the workers of the config: 0 for this process, N Ray Train workers, or "
            "from N to M of them, as many as the cluster has room for.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of --out, if any.")
    ] = False,
    cache: Cache = None,
) -> None:
    """Train a bundle from text."""
    from training.command import train_bundle

    with interruptible("go on with --resume"):
        train_bundle(config, data, out, holdout, licences, seed, workers, resume, cache)
    typer.echo(
        f"wrote {out}; measure it with: chameleon evaluate --bundle {out} --data {data}\n"
        f"and serve it with: chameleon serve --bundle {out}"
    )


@app.command(
    rich_help_panel=_PANEL,
    epilog="Variants are listed in the error that an unknown one gives.",
)
def evaluate(
    bundle: Annotated[Path, typer.Option(help="Folder that train wrote.")],
    data: Data,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write (default: BUNDLE-evaluation).")
    ] = None,
    settings: Annotated[Path | None, typer.Option(help="Settings of the evaluation, YAML.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few documents, cheap variants.")] = False,
    documents: Annotated[int | None, typer.Option(help="Scored documents of each domain.")] = None,
    expensive_documents: Annotated[
        int | None, typer.Option(help="Of these, how many expensive variants get.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Which to measure, separated by commas (default: all).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of arrival order, controls and bootstrap.")
    ] = None,
    budget: BudgetBundle = None,
    holdout: HoldoutBundle = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write figures and card into the bundle too.")
    ] = False,
    cache: Cache = None,
) -> None:
    """Measure a bundle against every baseline and control.

    Writes evaluation.json, report.md, documents.jsonl and plots. What was computed is kept in
    --cache: the same command goes on where it was stopped. Domains that the bundle was not trained
    on arrive as a stream.
    """
    from training.evaluation.command import evaluate_bundle

    given = {"documents": documents, "expensive_documents": expensive_documents}
    with interruptible("the same command goes on where it was stopped"):
        evaluate_bundle(
            bundle,
            data,
            cache,
            out,
            settings,
            quick=quick,
            seed=seed,
            variants=variants,
            counts={name: count for name, count in given.items() if count is not None},
            holdout=holdout,
            budget=budget,
            record=record,
        )


@app.command("data", rich_help_panel=_PANEL)
def list_data(
    data: Data,
    config: Annotated[Path | None, typer.Option(help="Settings of the run, YAML.")] = None,
    licences: Licences = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Count tokens too, which takes long.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cache: Cache = None,
) -> None:
    """List what is in a data set, and what is left out of it as duplicate."""
    from training.data.command import describe_data

    typer.echo(describe_data(data, config, licences, tokens, json, cache))


@app.command(rich_help_panel=_PANEL)
def seeds(
    evaluations: Annotated[list[Path], typer.Argument(help="Folders that evaluate wrote.")],
) -> None:
    """Put evaluations of several seeds side by side.

    Prints, for each group of domains, what each variant gains over the static update of its own
    seed, in nats per token: seed by seed, and the mean of the seeds with its 95 % interval (paired
    bootstrap over domains and documents) and its share of the static loss; last, what the own
    cluster's update gains over another's. Variants that not every evaluation measured on every
    document are left out.
    """
    from training.evaluation.seeds import compare

    typer.echo(compare(evaluations))


@app.command(rich_help_panel=_PANEL)
def reproduce_paper(
    data: Annotated[Path | None, typer.Option(help="Folder that holds wikitext-2/.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="Text file, folder or DOMAIN.train.jsonl.gz.")
    ] = None,
    validation: Annotated[Path | None, typer.Option(help="Text file.")] = None,
    test: Annotated[
        Path | None, typer.Option(help="Text file (default: half of --validation).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model (default: the embedded one).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("reproduction"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few lines of text: two minutes.")
    ] = False,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the paper's 5e-4.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds (default: 1).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Default: the paper's 10.")] = None,
    positions: Annotated[
        int | None, typer.Option(help="Scored positions drawn from each sequence (default: 16).")
    ] = None,
    train_sequences: Annotated[
        int | None, typer.Option(help="Training lines, published protocol (default: all).")
    ] = None,
    validation_sequences: Annotated[
        int | None, typer.Option(help="Validation lines, published protocol (default: all).")
    ] = None,
    train_windows: Annotated[
        int | None, typer.Option(help="Training windows, honest protocol (default: all).")
    ] = None,
    validation_windows: Annotated[
        int | None, typer.Option(help="Validation windows, honest protocol (default: 64).")
    ] = None,
    test_windows: Annotated[
        int | None, typer.Option(help="Test windows, honest protocol (default: 512).")
    ] = None,
    cache: Cache = None,
) -> None:
    """Repeat arXiv 2502.04315 as published, and under an honest loss."""
    from training.paper.command import reproduce

    given = {
        "model": model,
        "learning_rate": learning_rate,
        "seeds": None if seeds is None else tuple(range(seeds)),
        "epochs": epochs,
        "positions": positions,
        "train_sequences": train_sequences,
        "validation_sequences": validation_sequences,
        "train_windows": train_windows,
        "validation_windows": validation_windows,
        "test_windows": test_windows,
    }
    reproduce(data, (train, validation, test), given, quick, out, cache)
