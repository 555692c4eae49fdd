"""Next-token loss from final hidden states, in nats per token.

Row i of `hidden` is the state that predicts row i of `targets`. The LM head is frozen, so no
gradient is kept for it.
"""

from __future__ import annotations

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
