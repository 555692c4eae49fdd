"""Updates on the device: the resident cores, and the layers that apply them row by row.

Rows of any number of clusters share one batch. The big products (x V and U ...) run once for the
whole batch; only the r x r core is looked up per row. So a step costs the same however many
clusters are in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import DeltaError, ModelError

OFF = 0
"""Slot of rows that run unadapted: its numbers are zero, so the base output is unchanged."""


class RowSlots:
    """Which slot each row of the current step uses; None when no row is adapted.

    One instance is shared by the runner, which sets it before a step, and the layers that read it.
    """

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None


class AdapterBank:
    """Resident updates in numbered slots, with least-recently-used replacement.

    A slot in use by a running sequence is pinned and never replaced.

    Args:
        spec: form of the update.
        bases: its shared parts, on the CPU.
        capacity: updates held beside slot `OFF`.
        dtype, device: of the base model.
    """

    def __init__(
        self,
        spec: UpdateSpec,
        bases: SharedBases,
        capacity: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.spec = spec
        self.capacity = capacity
        self._free = list(range(capacity, OFF, -1))
        self._resident: OrderedDict[str, int] = OrderedDict()
        self._pins = [0] * (capacity + 1)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype=dtype, device=device)

        def slots(*shape: int) -> torch.Tensor:
            return torch.zeros(capacity + 1, *shape, dtype=dtype, device=device)

        self.s0, self.shift0 = place(bases.s0), place(bases.shift)
        self.u = [place(u) for u in bases.u]
        self.v = [place(v) for v in bases.v]
        if spec.depth == "paper":
            site = spec.sites[0]
            self.lora_a = slots(spec.rank, site.in_features)
            self.lora_b = slots(site.out_features, spec.rank)
        else:
            self.cores = slots(len(spec.sites), spec.rank, spec.rank)
            self.shifts = slots(spec.hidden_size)

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of the updates held, least recently used first."""
        return tuple(self._resident)

    def is_resident(self, delta: LoraDelta | None) -> bool:
        """Whether a sequence with `delta` could start without a load. None is unadapted."""
        return delta is None or delta.key.id in self._resident

    def can_acquire(self, delta: LoraDelta | None) -> bool:
        """Whether `acquire` would succeed."""
        return self.is_resident(delta) or bool(self._free) or self._victim() is not None

    def acquire(self, delta: LoraDelta | None) -> int:
        """Pin `delta`, loading it if needed, and return its slot. Ask `can_acquire` first."""
        if delta is None:
            return OFF
        name = delta.key.id
        if name not in self._resident:
            self._resident[name] = self._load(delta)
        self._resident.move_to_end(name)
        slot = self._resident[name]
        self._pins[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Undo one `acquire`. The update stays resident until its slot is needed."""
        if slot != OFF:
            self._pins[slot] -= 1

    def check_integrity(self, slots_in_use: Sequence[int]) -> None:
        """Assert that pins are exactly the slots of the running sequences."""
        pins = [0] * (self.capacity + 1)
        for slot in slots_in_use:
            if slot != OFF:
                pins[slot] += 1
        assert pins == self._pins, "adapter pins and running sequences differ"
        held = sorted([*self._free, *self._resident.values()])
        assert held == list(range(1, self.capacity + 1)), "adapter slots lost or held twice"

    def _victim(self) -> str | None:
        return next((name for name, slot in self._resident.items() if not self._pins[slot]), None)

    def _load(self, delta: LoraDelta) -> int:
        delta.check(self.spec)
        slot = self._free[-1] if self._free else self._resident[self._victim_or_fail()]
        if self.spec.depth == "paper":
            assert delta.lora_a is not None and delta.lora_b is not None
            self.lora_a[slot] = torch.from_numpy(delta.lora_a.copy())
            self.lora_b[slot] = torch.from_numpy(delta.lora_b.copy())
        else:
            assert delta.cores is not None and delta.shift is not None
            self.cores[slot] = self.s0 + torch.from_numpy(delta.cores.copy()).to(self.s0)
            self.shifts[slot] = self.shift0 + torch.from_numpy(delta.shift.copy()).to(self.shift0)
        if self._free:
            self._free.pop()
        else:
            del self._resident[self._victim_or_fail()]
        return slot

    def _victim_or_fail(self) -> str:
        victim = self._victim()
        assert victim is not None, "acquire without can_acquire"
        return victim


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus each row's update: inner(x) + U core V x.

    Args:
        inner: `nn.Linear` or GPT-2's `Conv1D`; called as it is.
        bank: holds the cores.
        site: index of this layer in the bank's spec.
        rows: the step's slots.
    """

    def __init__(self, inner: nn.Module, bank: AdapterBank, site: int, rows: RowSlots) -> None:
        super().__init__()
        self.inner = inner
        self._bank, self._site, self._rows = bank, site, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, T, in] -> [1, T, out]."""
        y: torch.Tensor = self.inner(x)
        slots = self._rows.tokens
        if slots is None:
            return y
        cores = self._bank.cores[slots, self._site]
        return y + _low_rank(x[0], self._bank.u[self._site], self._bank.v[self._site], cores)


class AdaptedHead:
    """The LM head with each row's update on the final hidden state (or, in the paper's form, on
    the head's own weight).
    """

    def __init__(self, lm_head: nn.Module, bank: AdapterBank | None) -> None:
        self._lm_head, self._bank = lm_head, bank

    def __call__(self, hidden: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
        """hidden [N, d], slots [N] or None (no row adapted) -> logits [N, vocab]."""
        if self._bank is None or slots is None:
            return self._logits(hidden)
        if self._bank.spec.depth == "paper":
            return self._paper_logits(hidden, slots, self._bank)
        site = self._bank.spec.head
        assert site is not None
        low_rank = _low_rank(
            hidden, self._bank.u[site], self._bank.v[site], self._bank.cores[slots, site]
        )
        return self._logits(hidden + self._bank.shifts[slots] + low_rank)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._lm_head(hidden)
        return logits

    def _paper_logits(
        self, hidden: torch.Tensor, slots: torch.Tensor, bank: AdapterBank
    ) -> torch.Tensor:
        logits = self._logits(hidden)
        scale = bank.spec.alpha / bank.spec.rank
        for slot in slots.unique().tolist():
            if slot == OFF:
                continue
            rows = (slots == slot).nonzero()[:, 0]
            update = F.linear(F.linear(hidden[rows], bank.lora_a[slot]), bank.lora_b[slot])
            logits[rows] += scale * update
        return logits


def _low_rank(
    x: torch.Tensor, u: torch.Tensor, v: torch.Tensor, cores: torch.Tensor
) -> torch.Tensor:
    """x [N, in], u [out, r], v [r, in], cores [N, r, r] -> [N, out]."""
    inner = F.linear(x, v)
    return F.linear(torch.bmm(cores, inner.unsqueeze(-1)).squeeze(-1), u)


def install(model: nn.Module, bank: AdapterBank, rows: RowSlots) -> None:
    """Wrap every linear layer that the bank's spec names, in place.

    Raises:
        ModelError: the model has no such layer, or one of another size.
        DeltaError: the bases do not fit the spec.
    """
    if bank.spec.depth == "paper":
        return
    if len(bank.u) != len(bank.spec.sites) or len(bank.v) != len(bank.spec.sites):
        raise DeltaError(f"the bundle's bases cover {len(bank.u)} of {len(bank.spec.sites)} sites")
    for index, site in enumerate(bank.spec.sites):
        if index == bank.spec.head:
            continue
        parent_name, _, name = site.name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            inner = parent.get_submodule(name)
        except AttributeError:
            raise ModelError(f"the update names {site.name}, which this model lacks") from None
        if sorted(inner.weight.shape) != sorted((site.in_features, site.out_features)):  # type: ignore[arg-type]
            raise ModelError(f"{site.name} is {tuple(inner.weight.shape)}, the update expects "  # type: ignore[arg-type]
                             f"{site.in_features} -> {site.out_features}")  # fmt: skip
        setattr(parent, name, AdaptedLinear(inner, bank, index, rows))
