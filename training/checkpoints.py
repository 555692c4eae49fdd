"""Where a run stands, on disk: one safetensors file for each stage, its record in the header.

A run that ends early leaves `<out>.partial`; `--resume` goes on from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster_router.wire.errors import BundleError, ConfigError, SetupError

_RECORD = "record"
_SETTINGS = "run.json"
_FREE = {"settings.workers", "settings.worker_cpus", "settings.max_failures"} | {
    f"settings.{stage}.{name}"
    for stage in ("static", "hyper")
    for name in ("learning_rate", "clip", "patience")
}
"""What a resumed run may change: where it runs, and how carefully a stage goes on."""


@dataclass(frozen=True, eq=False)
class Saved:
    """Where a stage stands.

    Attributes:
        tensors: by name.
        record: JSON values.
        finished: nothing is left to do in this stage.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    finished: bool


class StageFiles:
    """The stages of one run in a folder; each file appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, stage: str) -> Saved | None:
        """Where `stage` stands; None where it has not begun.

        Raises:
            BundleError: the file is damaged.
        """
        path = self._path(stage)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                record = json.loads(file.metadata()[_RECORD])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"the checkpoint {path} is damaged: {error}; remove it") from error
        return Saved(tensors, record["values"], record["finished"])

    def save(self, stage: str, saved: Saved) -> None:
        """Replace what is known of `stage`.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"values": saved.record, "finished": saved.finished}
        tensors = {name: tensor.contiguous() for name, tensor in saved.tensors.items()}
        temporary = self._path(stage).with_suffix(".tmp")
        try:
            save_file(tensors, temporary, {_RECORD: json.dumps(record, allow_nan=False)})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        temporary.replace(self._path(stage))

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"


class PartialRun:
    """The folder beside `out` that holds an unfinished run.

    Attributes:
        folder: `<out>.partial`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, out: Path, run: Mapping[str, Any], resume: bool) -> PartialRun:
        """Begin a run, or go on with the one that was interrupted, if there is one.

        Args:
            out: the folder that the finished run will be.
            run: what is run, JSON values only; its `settings` are those of `TrainSettings`.
            resume: go on; without it nothing unfinished may be there.

        Raises:
            BundleError: an unfinished run is there and `resume` is not asked for.
            ConfigError: the unfinished run is another one, or was run in another way.
            SetupError: the folder cannot be written.
        """
        partial = cls(out.with_name(out.name + ".partial"))
        known = partial._known()
        if known is not None and not resume:
            raise BundleError(
                f"{partial.folder} holds an unfinished run; go on with it by --resume, "
                "or remove it to start again",
                "resume",
            )
        if known is not None and (changed := sorted(_changed(known, run))):
            raise ConfigError(
                f"{partial.folder} was begun with other values of {', '.join(changed)}; "
                "restore them, or remove the folder to start again",
                changed[0],
            )
        try:
            partial._begin(run, fresh=known is None)
        except OSError as error:
            raise SetupError(
                f"cannot write {partial.folder}: {error}; free some space or name another --out",
                "out",
            ) from error
        return partial

    def remove(self) -> None:
        """The run is finished and its result written."""
        shutil.rmtree(self.folder)

    def _begin(self, run: Mapping[str, Any], fresh: bool) -> None:
        if fresh and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{_SETTINGS}.tmp"
        temporary.write_text(json.dumps(run, indent=1), encoding="utf-8")
        temporary.replace(self.folder / _SETTINGS)

    def _known(self) -> dict[str, Any] | None:
        """The run that left checkpoints here; one that ended before its first left nothing."""
        if not any(self.folder.rglob("*.safetensors")):
            return None
        try:
            known: dict[str, Any] = json.loads((self.folder / _SETTINGS).read_bytes())
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.folder} is damaged: {error}; remove it") from error
        return known


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the values that differ, except those that may."""
    names: set[str] = set()
    for key in old.keys() | new.keys():
        name, before, after = prefix + key, old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            names |= _changed(before, after, name + ".")
        elif before != after:
            names.add(name)
    return names - _FREE
