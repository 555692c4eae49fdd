"""What an evaluation has computed, kept on disk under the name of all that it depends on.

Scores are lines of one append-only file; updates that were trained here (refined cores, oracles)
are safetensors files. A line that was cut off when a run was stopped is ignored, and every file
appears whole or not at all, so a run that goes on finds what is there and computes the rest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster_router.wire.errors import SetupError
from training.evaluation.updates import Key

_SCORES = "scores.jsonl"


class Store:
    """One folder; created where missing.

    Raises:
        SetupError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._scores = folder / _SCORES
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._known = dict(_lines(self._scores))
        except OSError as error:
            raise _unwritable(folder, error) from error

    def score(self, key: Key) -> tuple[float, ...] | None:
        """What was kept under `key`."""
        return self._known.get(key)

    def add(self, scores: Mapping[Key, Sequence[float]]) -> None:
        """Keep `scores`; those that are there already stay as they are.

        Raises:
            SetupError: a score is NaN or infinite, or the disk is full.
        """
        fresh = {key: tuple(values) for key, values in scores.items() if key not in self._known}
        if not all(math.isfinite(value) for values in fresh.values() for value in values):
            raise SetupError("a loss is NaN or infinite; the bundle or the base model is broken")
        text = "".join(json.dumps([key, *values]) + "\n" for key, values in fresh.items())
        try:
            with self._scores.open("ab") as file:
                # What a stopped run cut off must not spoil the first new line.
                file.write(_missing_newline(self._scores) + text.encode())
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        self._known.update(fresh)

    def tensors(self, key: Key) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors kept under `key` and the facts beside them; None where there are none."""
        path = self._folder / f"{key}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(  # noqa: SIM118
                    file.metadata() or {}
                )
        except (SafetensorError, OSError):
            return None

    def add_tensors(
        self, key: Key, tensors: Mapping[str, Tensor], facts: Mapping[str, str]
    ) -> None:
        """Keep tensors.

        Raises:
            SetupError: the disk is full.
        """
        path = self._folder / f"{key}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            held = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(held, temporary, metadata=dict(facts))
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise _unwritable(self._folder, error) from error


def _lines(path: Path) -> dict[Key, tuple[float, ...]]:
    if not path.exists():
        return {}
    found: dict[Key, tuple[float, ...]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            key, *values = json.loads(line)
            found.setdefault(key, tuple(float(value) for value in values))
        except (ValueError, TypeError):
            continue
    return found


def _missing_newline(path: Path) -> bytes:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"


def _unwritable(folder: Path, error: Exception) -> SetupError:
    return SetupError(
        f"cannot keep scores in {folder}: {error}; free some space or name another folder "
        "with --cache"
    )
