"""`python -m training data`, and what every command takes for `--data`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from training.base import FrozenBase
from training.config import TrainSettings, load_settings
from training.data.hub import PREFIX
from training.data.licences import LICENCES_HELP, load_licences
from training.data.reader import open_reader
from training.data.survey import survey, survey_table

DATA_HELP = (
    "folder of text by domain (<domain>.<split>.jsonl.gz, <domain>.jsonl, <domain>.parquet, "
    "<domain>/*.txt), or hub:<organisation>/<dataset>[:<configuration>]"
)


def location(text: str) -> str:
    """What `--data` says, a folder by its absolute path: workers may run in another folder."""
    return text if text.startswith(PREFIX) else str(Path(text).resolve())


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Register the command; its `--data` and `--cache` are added where the others' are."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "data", help="list what is in a data set, and what is left out of it as duplicate"
    )
    parser.add_argument("--config", type=Path, help="settings of the run, YAML")
    parser.add_argument("--licences", type=Path, help=LICENCES_HELP)
    parser.add_argument("--tokens", action="store_true", help="count tokens too, which takes long")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=list_data)
    return parser


def list_data(options: argparse.Namespace) -> None:
    """Print the survey.

    Raises:
        ConfigError: the settings or the data cannot be read.
        SetupError: a library is missing, a dataset cannot be fetched, the cache cannot be written.
    """
    settings = load_settings(options.config) if options.config else TrainSettings()
    reader = open_reader(options.data, settings.data, options.cache)
    tokenizer = FrozenBase.resolve(settings.model).tokenizer if options.tokens else None
    licences = load_licences(options.licences)
    figures = {"data": options.data, **survey(reader, settings.data, licences, tokenizer)}
    print(json.dumps(figures, indent=1) if options.json else survey_table(figures, settings.data))
