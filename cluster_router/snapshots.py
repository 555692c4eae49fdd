"""SnapshotStore: published clusters in a folder, on disk or behind any URI that fsspec opens."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import safetensors.numpy
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from numpy.typing import NDArray
from safetensors import SafetensorError

from cluster_router.wire.errors import BundleError, ConfigError, SetupError
from cluster_router.wire.snapshot import ClusterSnapshot

_NAME = re.compile(r"snapshot-(\d{12})-([0-9a-f]{16})\.safetensors")
_STATE = "learner."
_INTEGERS = {"version", "ids", "sizes", "versions"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A snapshot for routers, and beside it what its learner needs to go on (may be empty)."""

    snapshot: ClusterSnapshot
    state: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class SnapshotStore:
    """Keeps the last `keep` checkpoints, each one safetensors file named by version and checksum.

    A file appears whole or not at all: on disk by a rename after the data has reached it, in an
    object store because a put is atomic there. One learner writes; any number of routers read.

    Args:
        uri: a local path, or a URI such as `s3://bucket/clusters`. Created when first written to.
        keep: how many checkpoints stay.

    Raises:
        ConfigError: nothing installed opens such a URI, or `keep` is below 1.
    """

    def __init__(self, uri: str, keep: int = 3) -> None:
        if keep < 1:
            raise ConfigError("keep at least one snapshot", "keep")
        self._files, self._root = _open(uri)
        self._keep = keep

    def latest_version(self) -> int | None:
        """Newest version there is, by name alone; None if there is none.

        Raises:
            SetupError: the folder cannot be listed.
        """
        names = self._names()
        return _version(names[-1]) if names else None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then drop the oldest beyond `keep`. Saving one twice is harmless.

        Raises:
            SetupError: it cannot be written (the disk is full, say), or a version at least as new
                is there, so that another learner writes here too. What was there stays.
        """
        data = _encode(checkpoint)
        version = checkpoint.snapshot.version
        name = f"snapshot-{version:012d}-{_digest(data)}.safetensors"
        names = self._names()
        if names and names[-1] != name and _version(names[-1]) >= version:
            raise SetupError(
                f"{self._root} holds version {_version(names[-1])}, not older than {version}; "
                "let one learner write there, or start it from the newest version"
            )
        try:
            self._write(name, data)
        except OSError as error:
            raise SetupError(
                f"cannot write {self._root}/{name}: {error}; free some space or name another "
                "folder for snapshots"
            ) from error
        self._prune()

    def load(self) -> Checkpoint | None:
        """The newest sound checkpoint; None if there is none at all. Damaged ones are logged.

        Raises:
            BundleError: there are checkpoints, and each is damaged.
            SetupError: the folder cannot be listed.
        """
        while names := self._names():
            damaged = 0
            for name in reversed(names):
                try:
                    return _decode(self._read(name), name)
                except BundleError as error:
                    damaged += 1
                    logger.error("%s; an older snapshot is used", error)
                except FileNotFoundError:
                    continue  # the learner has just dropped it, for a newer one
            if damaged:
                raise BundleError(
                    f"every snapshot in {self._root} is damaged; restore one, or remove them all "
                    "to start from the bundle's clusters"
                )
        return None

    def _names(self) -> list[str]:
        names = _list(self._files, self._root)
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _read(self, name: str) -> bytes:
        try:
            return bytes(self._files.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BundleError(f"cannot read {self._root}/{name}: {error}") from error

    def _write(self, name: str, data: bytes) -> None:
        if isinstance(self._files, LocalFileSystem):
            _write_local(Path(self._root), name, data)
        else:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(f"{self._root}/{name}", data)

    def _prune(self) -> None:
        for name in self._names()[: -self._keep]:
            try:
                self._files.rm_file(f"{self._root}/{name}")
            except OSError as error:
                logger.warning("cannot remove the old snapshot %s: %s", name, error)


def names_in(uri: str) -> list[str]:
    """Names of the files and folders directly under `uri`; none where it does not exist.

    Raises:
        ConfigError: nothing installed opens such a URI.
        SetupError: it cannot be listed.
    """
    return _list(*_open(uri))


def _open(uri: str) -> tuple[Any, str]:
    try:
        files, root = fsspec.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot open {uri!r}: {error}", "snapshots") from error
    return files, str(root)


def _list(files: Any, root: str) -> list[str]:
    try:
        files.invalidate_cache(root)
        paths = files.ls(root, detail=False)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SetupError(f"cannot list {root}: {error}") from error
    return [str(path).rstrip("/").rpartition("/")[2] for path in paths]


def _version(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _write_local(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # makes the rename itself durable
    finally:
        os.close(handle)


def _encode(checkpoint: Checkpoint) -> bytes:
    state = {f"{_STATE}{name}": values for name, values in checkpoint.state.items()}
    arrays = checkpoint.snapshot.arrays() | state
    return safetensors.numpy.save(
        {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    )


def _decode(data: bytes, name: str) -> Checkpoint:
    if _digest(data) not in name:
        raise BundleError(f"{name} is damaged: its checksum differs")
    try:
        arrays = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise BundleError(f"{name} is not a safetensors file: {error}") from error
    state = {
        key.removeprefix(_STATE): arrays.pop(key) for key in list(arrays) if key.startswith(_STATE)
    }
    for key, values in arrays.items():
        if values.dtype != (np.int64 if key in _INTEGERS else np.float32):
            raise BundleError(f"{name}: {key} has the wrong type {values.dtype}")
    return Checkpoint(ClusterSnapshot.from_arrays(arrays), state)
