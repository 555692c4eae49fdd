"""Prompt embeddings: a mask-aware weighted mean of token embeddings, without running the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cluster_router.wire.errors import ConfigError, RequestError
from cluster_router.wire.types import FloatArray


class TokenEmbedder:
    """Embeds token sequences with the base model's own input embedding.

    Args:
        embedding: [vocab, d], any float dtype. It is used as it is, so a bfloat16 tensor that maps
            a checkpoint costs no further memory.
        token_weights: float32 [vocab], how much each token counts (an inverse document frequency,
            for one); None counts all alike. A prompt of weightless tokens counts them alike too.

    Raises:
        ConfigError: the shapes disagree, or a weight is negative or not finite.
    """

    def __init__(
        self,
        embedding: NDArray[np.floating] | torch.Tensor,
        token_weights: FloatArray | None = None,
    ) -> None:
        if embedding.ndim != 2:
            raise ConfigError("embedding must be [vocab, d]", "embedding")
        self._embedding = torch.as_tensor(embedding)
        self._weights = None
        if token_weights is not None:
            _check_weights(token_weights, self.vocab_size)
            self._weights = torch.as_tensor(token_weights, dtype=torch.float32)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return int(self._embedding.shape[0])

    @property
    def dim(self) -> int:
        """Embedding size d."""
        return int(self._embedding.shape[1])

    def embed(self, tokens: Sequence[int]) -> FloatArray:
        """Embed one prompt.

        Returns:
            float32 [d] of unit length (of zeros where the tokens cancel out).

        Raises:
            RequestError: there is no token, or one lies outside the vocabulary.
        """
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        if len(ids) == 0:
            raise RequestError("the prompt has no content to embed; send at least one token")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise RequestError(f"prompt tokens must lie in 0..{self.vocab_size - 1}", "prompt")
        return self._embed(ids)

    def _embed(self, ids: torch.Tensor) -> FloatArray:
        vectors = self._embedding[ids].float()  # [T, d]
        total = vectors.sum(0)
        if self._weights is not None:
            weights = self._weights[ids]  # [T]
            if bool(weights.any()):
                total = (vectors * weights[:, None]).sum(0)
        # The mean's divisor is a positive scalar, which the norm takes out again.
        unit = torch.nn.functional.normalize(total, dim=0)
        return unit.numpy().astype(np.float32, copy=False)


def _check_weights(weights: FloatArray, vocab_size: int) -> None:
    if weights.shape != (vocab_size,):
        raise ConfigError(
            f"token_weights has shape {weights.shape}, the embedding has {vocab_size} tokens",
            "token_weights",
        )
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ConfigError("token_weights must be finite and not negative", "token_weights")
