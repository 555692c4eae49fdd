"""The most recent embeddings, in memory only."""

from __future__ import annotations

import numpy as np

from cluster_router.wire.types import FloatArray


class Window:
    """A ring of the last `capacity` embeddings of size `dim`, at two bytes a number."""

    def __init__(self, capacity: int, dim: int) -> None:
        self._capacity = capacity
        self._rows = np.empty((0, dim), np.float16)
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, embeddings: FloatArray) -> None:
        """Remember `embeddings` [N, d], forgetting the oldest."""
        rows = embeddings[-self._capacity :].astype(np.float16)
        grown = rows[: self._capacity - len(self._rows)]
        if len(grown):
            self._rows = np.concatenate([self._rows, grown])
        rest = rows[len(grown) :]
        self._rows[(self._next + np.arange(len(rest))) % self._capacity] = rest
        self._next = (self._next + len(rest)) % self._capacity

    def embeddings(self) -> FloatArray:
        """A float32 copy [n, d], in no particular order."""
        return self._rows.astype(np.float32)
