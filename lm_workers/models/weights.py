"""A model folder's files: what must be there, and single tensors read without the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster_router.wire.errors import ModelError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a safetensors file, not yet read."""

    name: str
    file: Path
    shape: tuple[int, ...]

    def read(self, rows: int | None = None) -> torch.Tensor:
        """The tensor, or its first `rows` rows."""
        with open_safetensors(self.file) as file:
            view = file.get_slice(self.name)
            return view[:] if rows is None else view[:rows]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, from the headers of its safetensors.

    Raises:
        ModelError: no safetensors, a shard missing or damaged, or less in them than indexed.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_paths(folder):
        if not path.is_file():
            raise ModelError(f"{path} is missing; fetch the model again")
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                tensors[name] = StoredTensor(name, path, tuple(file.get_slice(name).get_shape()))
    if (folder / INDEX).is_file():
        _check_index(folder, set(tensors))
    return tensors


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """`safe_open` for torch on the CPU; damage becomes a ModelError that names the file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or incomplete ({error}); fetch it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return content


def check_folder(folder: Path) -> Path:
    """Return `folder` if it holds a whole model and its tokenizer; else ModelError."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} has no {CONFIG}; {_hint(folder)}")
    read_json(folder / CONFIG)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds a PEFT adapter; merge it into its base model first")
    stored_tensors(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer; save it there with tokenizer.save_pretrained")
    return folder


def is_quantised(folder: Path) -> bool:
    """Whether the weights in `folder` are quantised."""
    return "quantization_config" in read_json(folder / CONFIG)


def _weight_paths(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
        # A shard lies beside its index: a name that leads elsewhere is not followed.
        return [folder / Path(str(shard)).name for shard in sorted(shards)]
    raise ModelError(f"{folder} has no {SINGLE} or {INDEX}; {_hint(folder)}")


def _check_index(folder: Path, found: set[str]) -> None:
    promised = read_json(folder / INDEX).get("weight_map", {})
    if missing := sorted(set(promised) - found):
        raise ModelError(f"the shards in {folder} lack {missing[0]}; fetch the model again")


def _hint(folder: Path) -> str:
    if any(folder.glob("*.gguf")):
        return "name the .gguf file itself"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            "pickled weights are never loaded, because loading them runs code: save the model "
            "again with model.save_pretrained(..., safe_serialization=True)"
        )
    return "give a folder with config.json, *.safetensors and a tokenizer"
