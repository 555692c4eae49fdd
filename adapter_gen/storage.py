"""Reading and writing the files of a bundle: safetensors and JSON, nothing that can run code."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapter_gen.hypernetwork import HypernetworkConfig
from adapter_gen.update import UpdateSpec
from cluster_router.wire.errors import BundleError

FORMAT_VERSION: Literal[1] = 1
MANIFEST = "bundle.json"
HYPERNETWORK = "hypernetwork.safetensors"
BASES = "bases.safetensors"
SNAPSHOT = "snapshot.safetensors"
TOKEN_WEIGHTS = "token_weights.safetensors"
EVALUATION = "evaluation.json"
REQUIRED = (HYPERNETWORK, BASES, SNAPSHOT)
OPTIONAL = (TOKEN_WEIGHTS, EVALUATION)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileRecord(_Strict):
    """What a file must be: its length in bytes and its SHA-256 in hex."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        """Describe `data`."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


class EmbeddingInfo(_Strict):
    """How the prompts behind the snapshot were embedded.

    `dim` is the embedding size, `tokens` how many leading prompt tokens were averaged (None: all).
    """

    dim: int = Field(ge=1)
    tokens: int | None = Field(default=None, ge=1)


class Manifest(_Strict):
    """`bundle.json`: what the bundle belongs to, how to rebuild it, and its files."""

    format_version: Literal[1] = FORMAT_VERSION
    base_model: str
    fingerprint: str
    spec: UpdateSpec
    hypernetwork: HypernetworkConfig
    embedding: EmbeddingInfo | None = None
    created_by: str = ""
    seed: int = 0
    files: dict[str, FileRecord]


def read_manifest(directory: Path) -> Manifest:
    """Parse `bundle.json`.

    Raises:
        BundleError: it is missing, of another format version, or holds a missing, unknown or
            malformed key or file name.
    """
    try:
        raw = json.loads(_read(directory, MANIFEST))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{directory / MANIFEST} is not JSON: {error}") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{directory / MANIFEST} has format version {version!r}, this release reads "
            f"{FORMAT_VERSION}; export the bundle again or use the release that wrote it"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BundleError(f"{directory / MANIFEST}: {place}: {first['msg']}") from None
    _check_names(manifest, directory)
    return manifest


def _check_names(manifest: Manifest, directory: Path) -> None:
    # Only these names are ever opened, so no name can lead out of the directory.
    for name in manifest.files:
        if name not in REQUIRED + OPTIONAL:
            raise BundleError(f"{directory / MANIFEST} lists {name!r}, which no bundle has")
    for name in REQUIRED:
        if name not in manifest.files:
            raise BundleError(f"{directory / MANIFEST} does not list {name}")


def read_file(directory: Path, name: str, record: FileRecord) -> bytes:
    """The checked content of one listed file.

    Raises:
        BundleError: the file is missing, outside the directory, of another length, or its
            checksum differs.
    """
    data = _read(directory, name, record.size)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise BundleError(f"{directory / name}: the checksum differs; fetch the bundle again")
    return data


def _read(directory: Path, name: str, size: int | None = None) -> bytes:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise BundleError(f"{path} is a link out of the bundle; copy the file into it")
    if not path.is_file():
        raise BundleError(f"{path} is missing")
    actual = path.stat().st_size
    if size is not None and actual != size:
        raise BundleError(f"{path} has {actual} bytes, expected {size}; fetch the bundle again")
    return path.read_bytes()


def write_file(path: Path, data: bytes) -> None:
    """Write `data` and wait until the disk holds it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def encode_json(value: Any) -> bytes:
    """Indented UTF-8 JSON; refuses NaN with a BundleError."""
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise BundleError(f"the evaluation cannot be written as JSON: {error}") from None
