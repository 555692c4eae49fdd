"""Feature cache: the frozen model's final hidden states at the scored positions, computed once.

At depth `head` nothing below the LM head changes, so training needs only these. One shard holds the
windows of a few documents and is named by the content that determines it (base model, data type,
tokens): a changed setting finds other shards, a resumed run finds those already written.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from cluster_router.wire.errors import SetupError
from training.data import Window

Encoder = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens int64 [B, T], mask int64 [B, T]) -> final hidden states [B, T, d], the head's input."""


class Features:
    """Hidden states and targets of a list of windows.

    Attributes:
        windows: what the rows belong to.
    """

    def __init__(self, windows: Sequence[Window], hidden: Sequence[torch.Tensor]) -> None:
        assert len(windows) == len(hidden)
        self.windows = list(windows)
        self._hidden = list(hidden)
        self._targets = [torch.from_numpy(w.targets.astype(np.int64)) for w in windows]

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def tokens(self) -> int:
        """How many scored tokens there are."""
        return sum(window.scored for window in self.windows)

    def hidden(self, index: int) -> torch.Tensor:
        """bfloat16 [scored, d]: row i is what predicts target i of window `index`."""
        return self._hidden[index]

    def targets(self, index: int) -> torch.Tensor:
        """int64 [scored] of window `index`."""
        return self._targets[index]


@dataclass(frozen=True)
class FeatureCache:
    """A folder of shards.

    Args:
        folder: where shards live; created where missing.
        base: fingerprint of the base model that `encode` runs.
        encode: the frozen model below its LM head.
        batch: documents in one forward pass.
        shard: documents in one shard.
    """

    folder: Path
    base: str
    encode: Encoder
    batch: int = 16
    shard: int = 32

    def features(self, windows: Sequence[Window], label: str = "features") -> Features:
        """Features of `windows`, from disk where they are there and sound, else computed.

        Raises:
            SetupError: the folder cannot be written, for instance because the disk is full.
        """
        hidden: list[torch.Tensor] = []
        total = sum(len(window.tokens) for window in windows)
        with tqdm(total=total, desc=label, unit="tok", unit_scale=True) as progress:
            for part in _shards(windows, self.shard):
                hidden.extend(self._shard(part))
                progress.update(sum(len(window.tokens) for window in part))
        return Features(windows, hidden)

    def _shard(self, part: Sequence[Window]) -> list[torch.Tensor]:
        path = self.folder / f"{self._key(part)}.safetensors"
        rows = _read(path)
        counts = [window.scored for window in part]
        if rows is None or len(rows) != sum(counts):
            rows = torch.cat(self._compute(part))
            _write(path, rows)
        return list(rows.split(counts))

    def _key(self, part: Sequence[Window]) -> str:
        digest = hashlib.sha256(f"{self.base}/bfloat16".encode())
        for window in part:
            digest.update(f"/{window.context}/{len(window.tokens)}/".encode())
            digest.update(window.tokens.tobytes())
        return digest.hexdigest()[:32]

    def _compute(self, part: Sequence[Window]) -> list[torch.Tensor]:
        """Hidden states per window; windows of like length share a forward pass."""
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(part)
        order = sorted(range(len(part)), key=lambda i: len(part[i].tokens))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            states = self.encode(*_pad([part[i] for i in chosen]))
            for row, i in enumerate(chosen):
                window = part[i]
                # The state at position t predicts token t + 1.
                first, last = window.context - 1, len(window.tokens) - 1
                hidden[i] = states[row, first:last].to(torch.bfloat16).clone()
        return hidden


def _shards(windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    """Runs of at most `size` windows of one domain: adding a domain moves no other shard."""
    start = 0
    for end in range(1, len(windows) + 1):
        last = end == len(windows) or windows[end].domain != windows[start].domain
        if last or end - start == size:
            yield windows[start:end]
            start = end


def _pad(windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(window.tokens) for window in windows)
    tokens = torch.zeros(len(windows), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, window in enumerate(windows):
        tokens[row, : len(window.tokens)] = torch.from_numpy(window.tokens.astype(np.int64))
        mask[row, : len(window.tokens)] = 1
    return tokens, mask


def _checksum(rows: torch.Tensor) -> str:
    return f"{zlib.crc32(rows.contiguous().view(torch.int16).numpy().data):08x}"


def _read(path: Path) -> torch.Tensor | None:
    """The shard at `path`, memory-mapped; None where it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            rows: torch.Tensor = file.get_tensor("hidden")
            expected = (file.metadata() or {}).get("crc32")
    except (SafetensorError, OSError):
        return None
    return rows if rows.dtype == torch.bfloat16 and _checksum(rows) == expected else None


def _write(path: Path, rows: torch.Tensor) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"hidden": rows.contiguous()}, temporary, metadata={"crc32": _checksum(rows)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise SetupError(
            f"cannot write the feature cache {path.parent}: {error}; "
            "free some space or name another folder with --cache",
        ) from error
