"""Folder: files that appear whole or not at all, on disk or behind any URI that fsspec opens."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from cluster_router.wire.errors import BundleError, ConfigError, SetupError


class Folder:
    """A flat folder. One process writes a name, any number read.

    On disk a file appears by a rename after its data has reached the disk; in an object store a put
    is atomic.

    Args:
        uri: a local path, or a URI such as `s3://bucket/clusters`. Created when first written to.
        purpose: what is kept there, for messages; the config key that names the folder.

    Raises:
        ConfigError: nothing installed opens such a URI.
    """

    def __init__(self, uri: str, purpose: str = "snapshots") -> None:
        self._purpose = purpose
        try:
            files, root = fsspec.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot open {uri!r}: {error}", purpose) from error
        self._files: Any = files
        self.root = str(root)

    def names(self) -> list[str]:
        """Names of the files and folders in it; none where it does not exist.

        Raises:
            SetupError: it cannot be listed.
        """
        try:
            self._files.invalidate_cache(self.root)
            paths = self._files.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SetupError(f"cannot list {self.root}: {error}") from error
        return [str(path).rstrip("/").rpartition("/")[2] for path in paths]

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: there is none of this name.
            BundleError: it cannot be read.
        """
        try:
            return bytes(self._files.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise BundleError(f"cannot read {self.root}/{name}: {error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file.

        Raises:
            SetupError: it cannot be written (the disk is full, say). What was there stays.
        """
        try:
            if isinstance(self._files, LocalFileSystem):
                _write_local(Path(self.root), name, data)
            else:
                self._files.makedirs(self.root, exist_ok=True)
                self._files.pipe_file(f"{self.root}/{name}", data)
        except OSError as error:
            raise SetupError(
                f"cannot write {self.root}/{name}: {error}; free some space or name another "
                f"folder for {self._purpose}"
            ) from error

    def remove(self, name: str) -> None:
        """Remove a file.

        Raises:
            OSError: it is not there or cannot be removed.
        """
        self._files.rm_file(f"{self.root}/{name}")


def digest(data: bytes) -> str:
    """Sixteen hex digits, for a file's name: a file that differs from them is damaged."""
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
