"""Matrix products: weight layouts, and linear layers that read the same input as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lm_workers.adapters import AdapterBank, RowSlots, UpdateTargets
from lm_workers.layers.kernels import Kernels, LateUpdate

Lookup = Callable[[torch.Tensor], torch.Tensor]
"""From numbers [N], int64 and in range, to rows of a matrix [N, in]."""

_PACK_ROWS = 16
"""Rows that the packed layout is chosen for. The result is the same for any number."""


class Product(ABC):
    """x W^T + b, in one layout of the weight [out, in].

    Attributes:
        min_rows: fewest rows that are summed in the same order as any other number of rows.
        widens: whether it also takes weights of a narrower dtype than it computes in.
        stacks: whether the V of updates cost least below the weights that read the same input.
        taped: whether a `Tape` notes it.
        rounding: how far logits may be off by it, as a share of their size, beside what the dtype
            explains.
    """

    min_rows: ClassVar[int]
    widens: ClassVar[bool] = False
    stacks: ClassVar[bool] = True
    taped: ClassVar[bool] = False
    rounding: ClassVar[float] = 0.0

    @abstractmethod
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None: ...

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""

    @property
    def rows(self) -> Lookup | None:
        """Looks rows of the weight up; None where the layout cannot tell them."""
        return None


class PlainProduct(Product):
    """As torch computes it. A lone row is a matrix-vector product, summed in another order."""

    min_rows = 2

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        return F.linear(x, self._weight, self._bias)


class PackedProduct(Product):
    """The same numbers as `PlainProduct`, from weights that oneDNN has laid out for its kernels.

    Without it every call lays them out again, which takes longer than a small product. Where a CPU
    multiplies tiles (AMX) the order of its sums depends on the number of rows.
    """

    min_rows = 2

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        y: torch.Tensor = self._product(x, self._weight, self._bias, "none", [], "")
        return y


def weight_of(module: nn.Module) -> torch.Tensor:
    """Weight [out, in] of an `nn.Linear` or of GPT-2's `Conv1D`, which holds its transpose."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


class RowUpdate:
    """What the update adds to the outputs of a group, row by row.

    Attributes:
        targets: the group's sites.
        may_be_late: whether the kernels can apply it when they read the outputs.
        apply: puts a late one into the outputs.

    Args:
        bank: the resident cores.
        rows: the step's slots.
        kernels: to apply them with.
        targets: see above.
    """

    def __init__(
        self, bank: AdapterBank, rows: RowSlots, kernels: Kernels, targets: UpdateTargets
    ) -> None:
        self._bank, self._rows, self.targets = bank, rows, targets
        self.may_be_late = bank.spec.rank <= kernels.late_rank
        self.apply = kernels.update

    def late(self, low: Callable[[], torch.Tensor]) -> LateUpdate | None:
        """The update of outputs whose input gives V x [T, G * r]; None if no row has one."""
        slots = self._rows.tokens
        return None if slots is None else LateUpdate(low(), self.targets, self._bank.cores, slots)


class LinearGroup(nn.Module):
    """Linear layers that read the same input, computed as one, with each row's update.

    Args:
        members: `nn.Linear` or `Conv1D`.
        layout: of the weights.
        update: None leaves the outputs as they are.
    """

    def __init__(
        self, members: Sequence[nn.Module], layout: type[Product], update: RowUpdate | None
    ) -> None:
        super().__init__()
        weights = [weight_of(member) for member in members]
        biases: list[object] = [member.bias for member in members]
        self._update, self._low = update, None
        self._width = sum(map(len, weights))
        if update is not None and layout.stacks:
            weights, biases = [*weights, update.targets.v], [*biases, None]
        elif update is not None:
            self._low = layout(update.targets.v, None)
        # A lone weight stays where it is: it may be the embedding's.
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self._product = layout(weight, _stacked_bias(weights, biases))

    @property
    def rows(self) -> Lookup | None:
        """Looks rows of the members' weights up, in their order; see `Product`."""
        return self._product.rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out], the members' outputs side by side."""
        rows = x.reshape(-1, x.shape[-1])
        y, late = self._computed(rows)
        if self._update is not None and late is not None:
            self._update.apply(y, late)
        y = y.contiguous()
        return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])

    def leave(self, x: torch.Tensor) -> tuple[torch.Tensor, LateUpdate | None]:
        """x [T, in] -> [T, out], and the update that is not in it, if one is not.

        What reads the outputs takes care of it, where its kernels can.
        """
        y, late = self._computed(x)
        if self._update is None or late is None or self._update.may_be_late:
            return y, late
        self._update.apply(y, late)
        return y, None

    def _computed(self, x: torch.Tensor) -> tuple[torch.Tensor, LateUpdate | None]:
        y = self._product(x)
        if self._update is None:
            return y, None
        if self._low is not None:
            return y, self._update.late(partial(self._low, x))
        return y[:, : self._width], self._update.late(lambda: y[:, self._width :])


def _stacked_bias(weights: Sequence[torch.Tensor], biases: Sequence[object]) -> torch.Tensor | None:
    if not any(isinstance(bias, torch.Tensor) for bias in biases):
        return None
    return torch.cat(
        [
            bias if isinstance(bias, torch.Tensor) else weight.new_zeros(len(weight))
            for weight, bias in zip(weights, biases, strict=True)
        ]
    )
