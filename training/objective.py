"""Next-token loss from final hidden states, in nats per token.

Row i of `hidden` is the state that predicts row i of `targets`: the feature cache shifts them
against each other and leaves padding out. The LM head is frozen, so no gradient is kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_CHUNK = 64
"""Rows at a time: their float32 logits over 50k tokens (12 MB) stay near the processor's caches."""


class _HeadNll(torch.autograd.Function):
    """Per-row loss with the gradient computed chunk by chunk in the forward pass.

    Logits are never held for the whole batch. `torch.nn.functional.linear_cross_entropy` chunks
    too, but returns bfloat16 losses for bfloat16 inputs and cannot return them row by row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        offset: torch.Tensor | None,
    ) -> torch.Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad = torch.empty_like(hidden)
        for start in range(0, len(hidden), _CHUNK):
            rows = slice(start, start + _CHUNK)
            target = targets[rows, None]
            logits = (hidden[rows] @ weight.T).float()
            if offset is not None:
                logits += offset
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            losses[rows] = (normaliser - logits.gather(1, target)).squeeze(1)
            if ctx.needs_input_grad[0]:
                gap = logits.sub_(normaliser).exp_()
                gap.scatter_add_(1, target, -torch.ones_like(target, dtype=gap.dtype))
                grad[rows] = gap.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0][:, None].to(grad.dtype), None, None, None


def head_nll(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of each row.

    Args:
        hidden: [n, d], the input of the LM head, in the data type of `weight`.
        weight: [vocabulary, d], the LM head.
        targets: int64 [n].
        offset: float32 [vocabulary], added to every row of logits.

    Returns:
        float32 [n], nats. Differentiable in `hidden` only.
    """
    result: torch.Tensor = _HeadNll.apply(hidden, weight, targets, offset)
    return result


@dataclass(frozen=True, eq=False)
class Candidates:
    """A part of the vocabulary that stands for all of it in one training batch.

    Attributes:
        tokens: int64 [k], ascending.
        offset: float32 [k], log of how many tokens of the vocabulary each one stands for.
    """

    tokens: torch.Tensor
    offset: torch.Tensor

    def nll(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """`head_nll` over these tokens; every target is among them."""
        rows = torch.searchsorted(self.tokens, targets)
        return head_nll(hidden, weight[self.tokens], rows, self.offset)


class CandidateSampler:
    """Draws candidates: the batch's targets, the most frequent tokens, and a sample of the rest.

    The sampled ones are weighted so that the expected normaliser is the exact one. The head's two
    matrix products over the whole vocabulary are nearly all the cost of a step, and a sixth of the
    vocabulary takes a sixth of the time. Figures are never computed this way.

    Args:
        counts: int64 [vocabulary], how often each token is a target in the training set.
        always: how many of the most frequent tokens are always taken.
        sampled: how many of the others are drawn.
    """

    def __init__(self, counts: torch.Tensor, always: int, sampled: int) -> None:
        self._frequent = counts.topk(min(always, len(counts))).indices
        self._size = len(counts)
        self._sampled = sampled

    def draw(self, targets: torch.Tensor, seed: int) -> Candidates:
        """Candidates for a batch with these targets, int64 [n]; a function of both."""
        random = torch.Generator().manual_seed(seed)
        rest = torch.ones(self._size, dtype=torch.bool)
        rest[self._frequent] = False
        rest[targets] = False
        others = rest.nonzero().squeeze(1)
        chosen = others[torch.randperm(len(others), generator=random)[: self._sampled]]
        weight = torch.zeros(self._size)
        weight[~rest] = 1.0
        weight[chosen] = len(others) / max(1, len(chosen))
        tokens = weight.nonzero().squeeze(1)
        return Candidates(tokens, weight[tokens].log())
