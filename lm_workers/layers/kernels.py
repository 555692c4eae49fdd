"""What a decoder layer computes beside its matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from lm_workers.adapters import UpdateTargets
from lm_workers.layers.paged import PagedStep


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms [head_dim] of each query and key head, before rotation."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


@dataclass(frozen=True)
class LateUpdate:
    """An update that a group of linear layers has left to what reads its outputs.

    Attributes:
        low: V x [T, G * r], of the group's input x.
        targets: the group's sites.
        cores: [slots, sites, r, r].
        slots: int64 [T]. Rows in slot 0 stay as they are.
    """

    low: torch.Tensor
    targets: UpdateTargets
    cores: torch.Tensor
    slots: torch.Tensor


class Kernels(Protocol):
    """Operations on T rows, each row independent of the others except through the KV cache.

    Results are rounded to the model's dtype wherever transformers rounds them. Where there is a
    `late` update, it goes into the argument before anything else; that one may be overwritten.

    Attributes:
        late_rank: the largest rank of updates that are left to what reads the outputs; 0 for none.
        most_context: tokens of context that a step of rows which decode may read, all together, to
            be worth recording; None for any number.
        taped: whether all that they do, but for `argmax`, is noted by a `Tape`.
    """

    late_rank: ClassVar[int]
    most_context: ClassVar[int | None]
    taped: ClassVar[bool]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [T, d] -> [T, d]."""
        ...

    def add(self, residual: torch.Tensor, x: torch.Tensor, late: LateUpdate | None) -> None:
        """Add x [T, d] to `residual` in place."""
        ...

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """Add x to `residual` in place, and return the norm of the sum, [T, d]."""
        ...

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
        paged: PagedStep,
        layer: int,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """Rotate queries and keys, and put keys and values into the cache.

        Args:
            qkv: [T, (heads + 2 kv_heads) * head_dim]; may be overwritten.
            rotary: cosines and sines, each [T, head_dim].
            norms: applied before the rotation.

        Returns:
            queries [T, heads, head_dim], perhaps a view of `qkv`.
        """
        ...

    def attend(
        self,
        query: torch.Tensor,
        paged: PagedStep,
        layer: int,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Causal attention of query [T, heads, head_dim] over the cache -> the same shape."""
        ...

    def silu_mul(self, gate_up: torch.Tensor, late: LateUpdate | None = None) -> torch.Tensor:
        """gate_up [T, 2n] -> silu(gate) * up, [T, n]."""
        ...

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, n] -> int64 [T], where each row is largest, the first place of equals."""
        ...

    def update(self, y: torch.Tensor, late: LateUpdate) -> None:
        """Add U core V x, with each row's own core, to the outputs y [T, out] in place."""
        ...
