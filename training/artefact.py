"""The folder a run leaves: a bundle, what is needed to measure it again, and its card."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from adapter_gen.bundle import Bundle
from cluster_router.wire.errors import BundleError
from training.card import EVALUATE_SETTINGS, card
from training.config import TrainSettings

_FOLDER = "training"
"""Subfolder of a bundle for what only training reads; serving never opens it."""


@dataclass(frozen=True, eq=False)
class Artefact:
    """A trained bundle with its history.

    Attributes:
        bundle: what is served; its bases alone are the baseline, a static update trained on
            the same tokens.
        settings: of the run.
        record: how training went, JSON values only.
    """

    bundle: Bundle
    settings: TrainSettings
    record: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the folder `path`, which appears whole or not at all.

        Raises:
            BundleError: `path` exists already.
        """
        if path.exists():
            raise BundleError(f"{path} exists; name another folder with --out or remove it", "out")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            folder = Path(scratch) / "bundle"
            self.bundle.save(folder)
            (folder / _FOLDER).mkdir()
            _write_json(folder / _FOLDER / "settings.json", self.settings.model_dump(mode="json"))
            _write_json(folder / _FOLDER / "record.json", self.record)
            if self.bundle.evaluation is not None:
                measured = yaml.safe_dump(self.bundle.evaluation["protocol"]["settings"])
                (folder / EVALUATE_SETTINGS).write_text(measured, encoding="utf-8")
            (folder / "README.md").write_text(self._card(), encoding="utf-8")
            folder.rename(path)

    def replace(self, path: Path) -> None:
        """Write over the artefact at `path`; at any moment either the old or the new one is whole.

        Raises:
            BundleError: there is none at `path`.
        """
        if not (path / _FOLDER).is_dir():
            raise BundleError(f"{path} holds no trained bundle to replace", "bundle")
        fresh, old = (path.with_name(f".{path.name}.{os.getpid()}.{n}") for n in ("new", "old"))
        self.save(fresh)
        path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old)

    def with_evaluation(self, evaluation: dict[str, Any]) -> Artefact:
        """The same artefact with other figures."""
        bundle = dataclasses.replace(self.bundle, evaluation=evaluation)
        return dataclasses.replace(self, bundle=bundle)

    @classmethod
    def load(cls, path: Path, fingerprint: str | None) -> Artefact:
        """Read the folder that `save` wrote.

        Raises:
            BundleError: it is damaged, of another base model, or was not made by training.
        """
        bundle = Bundle.load(path, fingerprint)
        folder = path / _FOLDER
        try:
            settings = TrainSettings.model_validate_json((folder / "settings.json").read_bytes())
            record = json.loads((folder / "record.json").read_bytes())
        except (OSError, ValidationError, ValueError) as error:
            raise BundleError(
                f"{folder} is missing or damaged, so {path} cannot be evaluated: {error}", "bundle"
            ) from error
        return cls(bundle, settings, record)

    def _card(self) -> str:
        return card(self.bundle, self.settings, self.record)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
