"""Choosing domains, and the checks of a corpus before anything is computed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster_router.wire.errors import ConfigError
from training.base import FrozenBase
from training.config import DataSettings, TrainSettings
from training.corpus import Corpus, Domains
from training.data import Reader, open_reader


@pytest.fixture(scope="module")
def reader(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return open_reader(data, DataSettings(), tmp_path_factory.mktemp("cache"))


def test_excluded_domains_are_never_seen_even_if_held_out_too(reader: Reader) -> None:
    settings = DataSettings(exclude=("sec*",), holdout=("numbers", "secret"))
    assert Domains.of(reader, settings) == Domains(("animals",), ("secret",), ("numbers",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DataSettings(exclude=("*",)), "nothing is left to train on"),
        (DataSettings(holdout=("nmbers",)), "'nmbers'"),
    ],
)
def test_a_choice_of_domains_that_cannot_be_is_refused(
    reader: Reader, settings: DataSettings, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Domains.of(reader, settings, asked_for=settings.holdout)


def test_a_recipe_may_hold_out_what_other_data_lacks_and_it_is_said(
    reader: Reader, caplog: pytest.LogCaptureFixture
) -> None:
    settings = DataSettings(holdout=("sec*", "poems", "prose"))
    assert Domains.of(reader, settings).held_out == ("secret",)
    (warning,) = caplog.messages
    assert "matches data.holdout 'poems', 'prose' of the config" in warning


def test_windows_longer_than_the_model_takes_are_refused(
    base: FrozenBase, data: Path, tmp_path: Path
) -> None:
    settings = DataSettings(context_tokens=64, scored_tokens=65)
    with pytest.raises(ConfigError, match=r"129 tokens do not fit .* context of 128"):
        Corpus.open(data, settings, base, tmp_path)


def test_only_training_documents_give_several_windows(
    base: FrozenBase, data: Path, settings: TrainSettings, tmp_path: Path
) -> None:
    shorter = {"context_tokens": 8, "scored_tokens": 8, "windows_per_document": 2}
    corpus = Corpus.open(data, settings.data.model_copy(update=shorter), base, tmp_path)
    assert len(corpus.split("train", ["numbers"])) == 2 * settings.data.train_documents
    assert len(corpus.split("test", ["numbers"])) == settings.data.test_documents


def test_a_missing_validation_split_stops_training_before_features_are_computed(
    base: FrozenBase,
    settings: TrainSettings,
    make_data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = make_data(tmp_path / "data", domains=("animals",))
    with gzip.open(folder / "animals.validation.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "all alone"}) + "\n")
    corpus = Corpus.open(folder, settings.data, base, tmp_path / "cache")
    with pytest.raises(ConfigError, match="the validation split of 'animals' holds 1"):
        corpus.split("train", ["animals"])
    assert not list((tmp_path / "cache").glob("*.safetensors"))
