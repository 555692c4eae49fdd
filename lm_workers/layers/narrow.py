"""Models whose matrices keep the narrower dtype that they are stored in until they are packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


def widen_all_but_matrices(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model compute in `dtype`, but for its linear layers.

    Norms and biases are converted. The embedding is not: only what is looked up in it.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.to(dtype)
    model.get_input_embeddings().register_forward_hook(lambda _, __, found: found.to(dtype))


@contextmanager
def widened(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Compute the linear layers in `dtype` too, with one weight at a time in it."""
    linears = [
        one for one in model.modules() if isinstance(one, nn.Linear) and one.weight.dtype != dtype
    ]
    for linear in linears:
        linear.forward = partial(_product, linear, dtype)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _product(linear: nn.Linear, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight.to(dtype), linear.bias)
