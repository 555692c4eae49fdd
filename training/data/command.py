"""`chameleon data`, and what every training command makes of `--data` and `--cache`."""

from __future__ import annotations

import json
from pathlib import Path

from lm_workers.models.source import default_cache
from training.base import FrozenBase
from training.config import TrainSettings, load_settings
from training.data.hub import PREFIX
from training.data.licences import load_licences
from training.data.reader import open_reader
from training.data.survey import survey, survey_table


def location(text: str) -> str:
    """What `--data` says, a folder by its absolute path: workers may run in another folder."""
    return text if text.startswith(PREFIX) else str(Path(text).resolve())


def features(cache: Path | None) -> Path:
    """Where computed features are kept."""
    return (cache or default_cache() / "features").resolve()


def describe_data(
    data: str,
    config: Path | None,
    licences: Path | None,
    tokens: bool,
    as_json: bool,
    cache: Path | None,
) -> str:
    """The survey, as a table or JSON.

    Raises:
        ConfigError: the settings or the data cannot be read.
        SetupError: a library is missing, a dataset cannot be fetched, the cache cannot be written.
    """
    settings = load_settings(config) if config else TrainSettings()
    place = location(data)
    reader = open_reader(place, settings.data, features(cache))
    tokenizer = FrozenBase.resolve(settings.model).tokenizer if tokens else None
    known = load_licences(licences)
    figures = {"data": place, **survey(reader, settings.data, known, tokenizer)}
    return json.dumps(figures, indent=1) if as_json else survey_table(figures, settings.data)
