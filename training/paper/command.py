"""`python -m training reproduce-paper`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapter_gen.storage import encode_json
from cluster_router.wire.errors import ConfigError, SetupError
from lm_workers.models.source import DEFAULT_MODEL, default_cache
from training.paper.report import honest_table, markdown, parameters_table, published_table
from training.paper.run import Reproduction
from training.paper.settings import QUICK, PaperSettings
from training.paper.text import Sources

_COUNTS = {
    "seeds": "how many seeds (default: 1)",
    "epochs": "epochs (default: the paper's 10)",
    "positions": "scored positions drawn from each sequence (default: 16)",
    "train-sequences": "training lines of the published protocol (default: all)",
    "validation-sequences": "validation lines of the published protocol (default: all)",
    "train-windows": "training windows of the honest protocol (default: all)",
    "validation-windows": "validation windows of the honest protocol (default: 64)",
    "test-windows": "test windows of the honest protocol (default: 512)",
}


def add_parser(commands: Any) -> None:
    """Register the command with the subparsers of the training command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "reproduce-paper", help="arXiv 2502.04315 as published, and under an honest loss"
    )
    parser.add_argument("--data", type=Path, help="folder that holds wikitext-2/")
    parser.add_argument("--train", type=Path, help="text file, folder or <domain>.train.jsonl.gz")
    parser.add_argument("--validation", type=Path, help="text file")
    parser.add_argument("--test", type=Path, help="text file (default: half of --validation)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("reproduction"), help="folder to write")
    parser.add_argument(
        "--cache", type=Path, default=default_cache() / "features", help="default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="a few lines of text: two minutes")
    parser.add_argument("--learning-rate", type=float, help="default: the paper's 5e-4")
    for name, text in _COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.set_defaults(run=reproduce)


def reproduce(options: argparse.Namespace) -> None:
    """Run, write report.json and report.md, print the tables.

    Raises:
        ConfigError: an option is missing or out of range, or there is no text.
        SetupError: the report or the cache cannot be written.
    """
    report = Reproduction(_settings(options), _sources(options), options.cache.resolve()).run()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.json").write_bytes(encode_json(report))
        (options.out / "report.md").write_text(markdown(report), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write {options.out}: {error}; name another folder", "out") from (
            error
        )
    for title, table in (
        ("parameters", parameters_table(report)),
        ("A. published protocol", published_table(report)),
        ("B. the same models, honest loss", honest_table(report["published_models_honest_loss"])),
        ("C. trained honestly", honest_table(report["honest_models_honest_loss"])),
    ):
        print(f"\n{title}\n{table}")
    print(f"\nwrote {options.out / 'report.md'} and report.json")


def _settings(options: argparse.Namespace) -> PaperSettings:
    names = [name.replace("-", "_") for name in (*_COUNTS, "learning-rate")]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if "seeds" in given:
        given["seeds"] = tuple(range(given["seeds"]))
    try:
        chosen = (dict(QUICK) if options.quick else {}) | given
        return PaperSettings.model_validate({"model": options.model} | chosen)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(f"--{name.replace('_', '-')}: {first['msg']}", name) from error


def _sources(options: argparse.Namespace) -> Sources:
    if options.data is not None and not (options.train or options.validation or options.test):
        return Sources.in_folder(options.data)
    if options.data is None and options.train and options.validation:
        return Sources(options.train, options.validation, options.test)
    raise ConfigError(
        "name either --data, a folder with wikitext-2/, or both --train and --validation", "data"
    )
