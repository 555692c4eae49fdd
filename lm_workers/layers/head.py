"""The LM head with each row's update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lm_workers.adapters import OFF, AdapterBank, UpdateTargets
from lm_workers.layers.kernels import Kernels, LateUpdate
from lm_workers.layers.linear import LinearGroup, Lookup, Product


class AdaptedHead:
    """Logits under each row's update, which acts on the final hidden state or, in the paper's
    form, on the head's own weight.

    Args:
        lm_head: the model's.
        layout: of its weight.
        kernels: apply the update.
        bank: None serves the base model alone.
    """

    def __init__(
        self,
        lm_head: nn.Module,
        layout: type[Product],
        kernels: Kernels,
        bank: AdapterBank | None,
    ) -> None:
        self._logits = LinearGroup([lm_head], layout, None)
        self._kernels, self._bank = kernels, bank
        self._targets: UpdateTargets | None = None
        if bank is not None and bank.spec.head is not None:
            self._targets = bank.targets([(bank.spec.head, 0, bank.spec.hidden_size)])
            self._low = layout(self._targets.v, None)

    @property
    def rows(self) -> Lookup | None:
        """Looks rows of its weight up; see `Product`."""
        return self._logits.rows

    @property
    def waits(self) -> bool:
        """Whether its updates are looked up from Python, which waits for the slots."""
        return self._bank is not None and self._targets is None

    def __call__(self, hidden: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
        """hidden [N, d], slots [N] or None (no row adapted) -> logits [N, vocab]."""
        if self._bank is None or slots is None:
            return self._logits(hidden)
        if self._targets is None:
            return self._paper_logits(hidden, slots, self._bank)
        shifted = hidden + self._bank.shifts[slots]
        low = self._low(hidden)
        self._kernels.update(shifted, LateUpdate(low, self._targets, self._bank.cores, slots))
        return self._logits(shifted)

    def _paper_logits(
        self, hidden: torch.Tensor, slots: torch.Tensor, bank: AdapterBank
    ) -> torch.Tensor:
        logits: torch.Tensor = self._logits(hidden)
        scale = bank.spec.alpha / bank.spec.rank
        for slot in slots.unique().tolist():
            if slot == OFF:
                continue
            rows = (slots == slot).nonzero()[:, 0]
            update = F.linear(F.linear(hidden[rows], bank.lora_a[slot]), bank.lora_b[slot])
            logits[rows] += scale * update
        return logits
