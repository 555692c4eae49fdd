"""The text of a reproduction: where it is, and what the two protocols cut it into."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cluster_router.wire.errors import ConfigError
from training.data import Split, Tokenizer, Window, spread
from training.data.folder import REGRESSION_FOLDER, RUNNING_TEXTS, running_text
from training.data.sources import Source
from training.data.tables import Columns, JsonLines

IntArray = NDArray[np.int64]
FALLBACK = "wikipedia"
"""The domain trained on where WikiText-2's training split is not there."""

_PACKED = ".jsonl.gz"


@dataclass(frozen=True)
class Sources:
    """The files of a run. Without a `test` the second half of the validation text is the test."""

    train: Path
    validation: Path
    test: Path | None = None

    @classmethod
    def in_folder(cls, data: Path) -> Sources:
        """WikiText-2 in `data`/wikitext-2, with a Wikipedia domain to train on where it lacks that.

        Raises:
            ConfigError: there is no validation text, or nothing to train on.
        """
        train = running_text(data, "train") or data / f"{FALLBACK}.train{_PACKED}"
        validation = running_text(data, "validation")
        if validation is None or not train.is_file():
            raise ConfigError(
                f"{data / REGRESSION_FOLDER} holds no validation text (valid.txt) or {data} "
                f"nothing to train on (wikitext-2/train.txt, {train.name}); put them there, or "
                "name files with --train and --validation",
                "data",
            )
        return cls(train, validation, running_text(data, "test"))

    @property
    def trains_on_wikitext(self) -> bool:
        """Whether the training file has a name under which WikiText-2 travels."""
        return self.train.name in RUNNING_TEXTS["train"]


def read_text(path: Path) -> str:
    """A text file, a `<domain>.<split>.jsonl.gz`, or all of a folder's (only its training ones).

    Documents of a domain are joined by a blank line.

    Raises:
        ConfigError: there is no text, or it cannot be read.
    """
    if path.is_dir():
        files = sorted(path.glob(f"*.train{_PACKED}")) or sorted(path.rglob("*.txt"))
        text = "\n\n".join(read_text(file) for file in files)
    elif path.name.endswith(_PACKED):
        text = _documents(path)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}; name another file", "text") from error
    if not text.strip():
        raise ConfigError(f"{path} holds no text; name another file", "text")
    return text


def _documents(path: Path) -> str:
    domain, _, split = path.name.removesuffix(_PACKED).rpartition(".")
    for known in get_args(Split):
        if split == known and domain:
            source = Source(JsonLines(path), Columns("text", "source"), domain, ((known, 1.0),))
            documents = spread(source.documents(known), sys.maxsize)
            return "\n\n".join(document.text for document in documents)
    raise ConfigError(
        f"{path.name} must be named <domain>.<split>{_PACKED}, the split one of "
        f"{', '.join(get_args(Split))}",
        "text",
    )


def published_sequences(
    tokenizer: Any, text: str, length: int, limit: int | None = None
) -> torch.Tensor:
    """The paper's samples: each non-blank line, cut to `length` and filled up on the right.

    Args:
        tokenizer: a transformers tokenizer.
        text: lines.
        length: of every sequence.
        limit: take this many lines, spread evenly over the text.

    Returns:
        int64 [N, length].
    """
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    if limit is not None:
        lines = [lines[i] for i in _spread(len(lines), limit)]
    sequences = torch.full((len(lines), length), padding_token(tokenizer), dtype=torch.int64)
    for row, ids in enumerate(tokenizer(lines, add_special_tokens=False)["input_ids"]):
        kept = torch.tensor(ids[:length], dtype=torch.int64)
        sequences[row, : len(kept)] = kept
    return sequences


def padding_token(tokenizer: Any) -> int:
    """What the authors' code pads with: the padding token, else end-of-text.

    Raises:
        ConfigError: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("the model's tokenizer has no padding or end-of-text token", "model")


def honest_windows(
    tokenizer: Tokenizer, text: str, length: int, context: int, limit: int | None = None
) -> list[Window]:
    """Running text as windows that share no token: `context` first, the rest scored.

    With `limit`, that many windows spread evenly over the text. What is left at the end of the text
    is dropped.

    Raises:
        ConfigError: the text fills fewer than two windows.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(ids) // length
    if count < 2:
        raise ConfigError(
            f"a text of {len(ids)} tokens fills fewer than two windows of {length}; "
            "give a longer text",
            "text",
        )
    parts = [ids[i * length : (i + 1) * length] for i in _spread(count, limit or count)]
    return [
        Window(
            np.array(part, np.int32),
            context,
            "text",
            len(tokenizer.decode(part[context:]).encode()),
        )
        for part in parts
    ]


def _spread(count: int, limit: int) -> list[int]:
    """`limit` indices spread evenly over `count`, all of them where there are no more."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(int)).tolist()
