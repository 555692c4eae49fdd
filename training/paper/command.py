"""`chameleon reproduce-paper`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapter_gen.storage import encode_json
from cluster_router.wire.errors import ConfigError, SetupError
from lm_workers.models.source import DEFAULT_MODEL
from training.data.command import features
from training.paper.report import honest_table, markdown, parameters_table, published_table
from training.paper.run import Reproduction
from training.paper.settings import QUICK, PaperSettings
from training.paper.text import Sources


def reproduce(
    data: Path | None,
    texts: tuple[Path | None, Path | None, Path | None],
    given: Mapping[str, Any],
    quick: bool,
    out: Path,
    cache: Path | None,
) -> None:
    """Run, write report.json and report.md, print the tables.

    Args:
        data: folder that holds wikitext-2/; None where `texts` are named.
        texts: what to train, validate and test on.
        given: settings that replace the paper's; None does not.
        quick: only a few lines of text.
        out: folder to write.
        cache: where computed features are kept; None is this user's cache.

    Raises:
        ConfigError: an option is missing or out of range, or there is no text.
        SetupError: the report or the cache cannot be written.
    """
    report = Reproduction(_settings(given, quick), _sources(data, *texts), features(cache)).run()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_bytes(encode_json(report))
        (out / "report.md").write_text(markdown(report), encoding="utf-8")
    except OSError as error:
        raise SetupError(f"cannot write {out}: {error}; name another folder", "out") from error
    for title, table in (
        ("parameters", parameters_table(report)),
        ("A. published protocol", published_table(report)),
        ("B. the same models, honest loss", honest_table(report["published_models_honest_loss"])),
        ("C. trained honestly", honest_table(report["honest_models_honest_loss"])),
    ):
        print(f"\n{title}\n{table}")
    print(f"\nwrote {out / 'report.md'} and report.json")


def _settings(given: Mapping[str, Any], quick: bool) -> PaperSettings:
    chosen = {"model": DEFAULT_MODEL} | (dict(QUICK) if quick else {})
    chosen |= {name: value for name, value in given.items() if value is not None}
    try:
        return PaperSettings.model_validate(chosen)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(f"--{name.replace('_', '-')}: {first['msg']}", name) from error


def _sources(
    data: Path | None, train: Path | None, validation: Path | None, test: Path | None
) -> Sources:
    if data is not None and not (train or validation or test):
        return Sources.in_folder(data)
    if data is None and train and validation:
        return Sources(train, validation, test)
    raise ConfigError(
        "name either --data, a folder with wikitext-2/, or both --train and --validation", "data"
    )
