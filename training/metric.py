"""The metric of the loss on hidden states, so that every direction trains at its own pace.

The logits answer some directions of the hidden state hundreds of times more strongly than others,
and a step that suits the strong ones leaves the weak ones, where clusters differ, nearly still.
Trained in whitened coordinates, all of them move alike. This is the Kronecker-factored curvature of
Martens and Grosse (arXiv 1503.05671) for a single layer, estimated once and held fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.features import Features

_DAMPING = 0.1
"""Added to every eigenvalue, as a share of their mean."""
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Metric:
    """Whitening of the hidden state as the loss sees it, and as the model produces it.

    Attributes:
        output: float32 [d, d], (H + damping)^-1/2 for H the expected second derivative of the loss
            by the hidden state.
        input: float32 [d, d], (C + damping)^-1/2 for C the second moment of the hidden states.
    """

    output: Tensor
    input: Tensor

    @classmethod
    def identity(cls, size: int) -> Metric:
        """No whitening."""
        return cls(torch.eye(size), torch.eye(size))

    @classmethod
    @torch.no_grad()
    def estimate(cls, features: Features, weight: Tensor, rows: int) -> Metric:
        """Estimate from about `rows` scored tokens spread over all windows.

        Args:
            features: of the training set.
            weight: [vocabulary, d], the LM head.
            rows: more rows, less noise; well above d.
        """
        hidden = _sample(features, rows)
        head = weight.float()
        mean_probability = torch.zeros(len(weight))
        outer = torch.zeros(weight.shape[1], weight.shape[1])
        for part in hidden.split(_CHUNK):
            probability = (part @ weight.T).float().softmax(dim=1)
            mean_probability += probability.sum(0)
            expected = probability @ head  # [n, d], the mean row of the head under the model
            outer += expected.T @ expected
        second = (head.T * (mean_probability / len(hidden))) @ head
        states = hidden.float()
        return cls(
            output=_inverse_root(second - outer / len(hidden)),
            input=_inverse_root(states.T @ states / len(hidden)),
        )


def _sample(features: Features, rows: int) -> Tensor:
    step = max(1, features.tokens // rows)
    return torch.cat(
        [features.hidden(index)[index % step :: step] for index in range(len(features))]
    )


def _inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    damped = values.clamp_min(0) + _DAMPING * values.mean()
    return (vectors / damped.sqrt()) @ vectors.T
