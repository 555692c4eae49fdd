"""Small files of the cache: what transformers says of a model, asked once.

Only to read a config or choose a tokenizer's class it imports torch's compiler and more, which
takes every process of a service a second and much memory (docs/guides/performance.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import transformers

from lm_workers.models.source import default_cache
from lm_workers.models.weights import CONFIG

_TOKENIZER_CONFIG = "tokenizer_config.json"
logger = logging.getLogger(__name__)


class KeptFile:
    """One file. Failures to read or write it are those of a file that is not there.

    Args:
        kind: the folder in the cache.
        name: the file's.
        cache_dir: default: see `resolve_model`.
    """

    def __init__(self, kind: str, name: str, cache_dir: Path | None = None) -> None:
        self.path = (cache_dir or default_cache()) / kind / name

    def write(self, fill: Callable[[Path], object]) -> None:
        """Have `fill` write it, which appears whole or not at all."""
        scratch = self.path.with_suffix(f".{uuid4().hex}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fill(scratch)
            scratch.replace(self.path)
        except Exception as error:  # safetensors has its own kinds
            logger.info("%s is not kept: %s", self.path, error)
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove it."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


class KeptAnswer:
    """What transformers answered to one question about a model folder, as JSON.

    It holds for this version of transformers, this config and tokenizer's config, and files of
    these names and sizes.

    Args:
        question: its name.
        folder: the model's.
        cache_dir: default: see `resolve_model`.
    """

    def __init__(self, question: str, folder: Path, cache_dir: Path | None = None) -> None:
        name = _digest(folder)
        self._file = None if name is None else KeptFile(question, f"{name}.json", cache_dir)

    def read(self) -> object:
        """The answer, None where there is none."""
        if self._file is None:
            return None
        try:
            return json.loads(self._file.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def keep(self, answer: object) -> None:
        """Keep an answer."""
        if self._file is not None:
            self._file.write(lambda file: file.write_text(json.dumps(answer), encoding="utf-8"))


def _digest(folder: Path) -> str | None:
    try:
        files = sorted((one.name, one.stat().st_size) for one in folder.iterdir() if one.is_file())
        texts = [
            (folder / name).read_bytes()
            for name in (CONFIG, _TOKENIZER_CONFIG)
            if (folder / name).is_file()
        ]
    except OSError:
        return None
    facts = (files, texts, transformers.__version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
