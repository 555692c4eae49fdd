"""Vocabulary entries that characterise a direction in embedding space, for people to read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cluster_router.wire.types import FloatArray

_WORD = re.compile(r" [^\W\d_]{3,}")  # a word of at least three letters, with its leading space


class CharacteristicTokens:
    """Names a direction by the words whose token embeddings align best with it.

    Args:
        embedding: [vocab, d], the matrix the prompts were embedded with.
        decode: text of one token.
        count: how many words to name.
    """

    def __init__(
        self,
        embedding: NDArray[np.floating] | torch.Tensor,
        decode: Callable[[int], str],
        count: int = 8,
    ) -> None:
        self._count = count
        texts = [decode(token) for token in range(len(embedding))]
        readable = [token for token, text in enumerate(texts) if _WORD.fullmatch(text)]
        self._words = [texts[token].strip() for token in readable]
        self._vectors = torch.as_tensor(embedding)[torch.as_tensor(readable, dtype=torch.int64)]

    def __call__(self, directions: FloatArray) -> list[tuple[str, ...]]:
        """Name each row of `directions` [K, d], best word first."""
        queries = torch.as_tensor(directions, dtype=self._vectors.dtype)
        if not self._words:
            return [()] * len(queries)
        scores = queries @ self._vectors.T  # [K, words]
        # Case and plural variants are dropped from the ranking, so fetch more than are shown.
        best = scores.topk(min(8 * self._count, len(self._words)), dim=1).indices
        return [self._distinct(self._words[i] for i in row) for row in best.tolist()]

    def _distinct(self, words: Iterable[str]) -> tuple[str, ...]:
        chosen: dict[str, str] = {}
        for word in words:
            chosen.setdefault(word.casefold(), word)
            if len(chosen) == self._count:
                break
        return tuple(chosen.values())


Describe = Callable[[FloatArray], Sequence[tuple[str, ...]]]
"""Words for each row of directions [K, d]; `CharacteristicTokens` is one."""
