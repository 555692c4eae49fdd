"""SnapshotStore: published clusters in a folder, on disk or behind any URI that fsspec opens."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from cluster_router.files import Folder, digest
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
        self._folder = Folder(uri)
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
        name = f"snapshot-{version:012d}-{digest(data)}.safetensors"
        names = self._names()
        if names and names[-1] != name and _version(names[-1]) >= version:
            raise SetupError(
                f"{self._folder.root} holds version {_version(names[-1])}, not older than "
                f"{version}; let one learner write there, or start it from the newest version"
            )
        self._folder.write(name, data)
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
                    return _decode(self._folder.read(name), name)
                except BundleError as error:
                    damaged += 1
                    logger.error("%s; an older snapshot is used", error)
                except FileNotFoundError:
                    continue  # the learner has just dropped it, for a newer one
            if damaged:
                raise BundleError(
                    f"every snapshot in {self._folder.root} is damaged; restore one, or stop the "
                    "service, remove them all and the namespace's refined-* files, which are of "
                    "clusters that are lost, and start it again from the bundle's clusters"
                )
        return None

    def _names(self) -> list[str]:
        return sorted(name for name in self._folder.names() if _NAME.fullmatch(name))

    def _prune(self) -> None:
        for name in self._names()[: -self._keep]:
            try:
                self._folder.remove(name)
            except OSError as error:
                logger.warning("cannot remove the old snapshot %s: %s", name, error)


def _version(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def _encode(checkpoint: Checkpoint) -> bytes:
    state = {f"{_STATE}{name}": values for name, values in checkpoint.state.items()}
    arrays = checkpoint.snapshot.arrays() | state
    return safetensors.numpy.save(
        {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    )


def _decode(data: bytes, name: str) -> Checkpoint:
    if digest(data) not in name:
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
