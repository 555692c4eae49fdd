"""Vocabulary entries that characterise a direction in embedding space, for people to read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cluster_router.wire.types import FloatArray

Describe = Callable[[FloatArray], Sequence[tuple[str, ...]]]
"""Words for each row of directions [K, d]; a `CharacteristicTokens` is one."""

_WORD = re.compile(r" [^\W\d_]{3,}")  # a word of at least three letters, with its leading space
_COMMON_DIRECTIONS = 12
_ROWS_AT_ONCE = 4096  # bounds the float32 copy of the embedding
_DIRECTIONS_AT_ONCE = 256  # bounds the table of scores


class CharacteristicTokens:
    """Names a direction by the words whose token embeddings align best with it.

    Token embeddings share a few strong directions that tell how frequent a token is, or whether it
    is a fragment, but not what it is about. Under a plain inner product these decide, and every
    cluster is called "the, and, for". So the leading principal components of the embedding matrix
    are taken out of the direction first, as in Mu and Viswanath, "All-but-the-Top" (ICLR 2018).

    Args:
        embedding: [vocab, d], the matrix the prompts were embedded with.
        decode: text of one token as it reads after another, its leading space with it.
        count: how many words to name.
    """

    def __init__(
        self,
        embedding: NDArray[np.floating] | torch.Tensor,
        decode: Callable[[int], str],
        count: int = 8,
    ) -> None:
        self._count = count
        self._embedding = torch.as_tensor(embedding)
        texts = [decode(token) for token in range(len(embedding))]
        readable = [token for token, text in enumerate(texts) if _WORD.fullmatch(text)]
        self._tokens = torch.as_tensor(readable, dtype=torch.int64)
        self._words = [texts[token].strip() for token in readable]
        self._common = self._common_directions()  # [d, components]

    def __call__(self, directions: FloatArray) -> list[tuple[str, ...]]:
        """Name each row of `directions` [K, d], best word first."""
        if not self._words:
            return [()] * len(directions)
        rows = torch.as_tensor(directions, dtype=torch.float32).split(_DIRECTIONS_AT_ONCE)
        return [names for part in rows for names in self._name(part)]

    def _name(self, directions: torch.Tensor) -> list[tuple[str, ...]]:
        distinct = directions - (directions @ self._common) @ self._common.T
        scores = torch.cat(
            [distinct @ part.T for part in self._vectors(self._tokens)], dim=1
        )  # [K, words]
        # Variants of a word are dropped from the ranking, so fetch more than are shown.
        best = scores.topk(min(8 * self._count, len(self._words)), dim=1).indices
        return [self._without_variants(self._words[i] for i in row) for row in best.tolist()]

    def _without_variants(self, words: Iterable[str]) -> tuple[str, ...]:
        chosen: list[str] = []
        for word in words:
            if len(chosen) == self._count:
                break
            if not any(_variants(word.casefold(), other.casefold()) for other in chosen):
                chosen.append(word)
        return tuple(chosen)

    def _vectors(self, tokens: torch.Tensor) -> Iterable[torch.Tensor]:
        """Embeddings of `tokens`, float32 [<= rows at once, d] each."""
        return (self._embedding[part].float() for part in tokens.split(_ROWS_AT_ONCE))

    def _common_directions(self) -> torch.Tensor:
        vocab, dim = self._embedding.shape
        total, gram = torch.zeros(dim), torch.zeros(dim, dim)
        for part in self._vectors(torch.arange(vocab)):
            total += part.sum(0)
            gram += part.T @ part
        covariance = gram / vocab - torch.outer(total, total) / vocab**2
        components = min(_COMMON_DIRECTIONS, dim // 4)
        return torch.linalg.eigh(covariance).eigenvectors[:, dim - components :]


def _variants(word: str, other: str) -> bool:
    """Whether one begins with the other, as plurals and most inflections do."""
    return word.startswith(other) or other.startswith(word)
