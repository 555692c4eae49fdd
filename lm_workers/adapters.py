"""Updates on the device: the shared bases, and the resident cores in numbered slots.

Rows of any number of clusters share one batch. The big products (x V and U ...) run once for the
whole batch; only the r x r core is looked up per row. So a step costs the same however many
clusters are in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec

OFF = 0
"""Slot of rows that run unadapted: its numbers are zero, so the base output is unchanged."""

PIECE = 32
"""Columns of a piece of U; native.cpp counts on it."""


@dataclass(frozen=True, eq=False)
class UpdateTargets:
    """The sites of a group of linear layers that are computed as one.

    Attributes:
        targets: int64 [G, 3] on the CPU: site, its first output column, its number of columns.
        u: [r, sum of columns], the sites' U transposed, side by side.
        v: [G * r, in], the sites' V stacked.
    """

    targets: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor

    @cached_property
    def sites(self) -> torch.Tensor:
        """Each target's site: int64 [G], where `u` is."""
        return self.targets[:, 0].contiguous().to(self.u.device)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Of each target its first output column, its columns, and the first of them in `u`."""
        columns = self.targets[:, 2:]
        found = torch.cat([self.targets[:, 1:], columns.cumsum(0) - columns], 1)
        return tuple(found.flatten().tolist())

    @cached_property
    def pieces(self) -> torch.Tensor:
        """`u` in pieces of `PIECE` columns, [N, r / P, PIECE, P], to be read as one stream.

        P numbers of a column, as many as fit in 4 bytes, lie side by side. Zeros fill up a site's
        last piece, and the rank.
        """
        pack = 4 // self.u.itemsize
        parts = self.u.split(self.targets[:, 2].tolist(), 1)
        padded = [F.pad(one, (0, -one.shape[1] % PIECE, 0, -len(one) % pack)) for one in parts]
        pieces = [one.reshape(-1, pack, one.shape[1] // PIECE, PIECE) for one in padded]
        return torch.cat([one.permute(2, 0, 3, 1) for one in pieces]).contiguous()


class RowSlots:
    """Which slot each row of the current step uses; None when no row is adapted.

    One instance is shared by the runner, which sets it before a step, and the layers that read it.
    """

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None


class AdapterBank:
    """Resident updates in numbered slots, with least-recently-used replacement.

    A slot in use by a running sequence is pinned and never replaced.

    Attributes:
        loads: updates brought here since the start.
        evictions: of these, how many pushed out another.

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
        self.loads = self.evictions = 0

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

    def targets(self, placed: Sequence[tuple[int, int, int]]) -> UpdateTargets:
        """Sites that are applied together, each with its first output column and their number."""
        sites = [site for site, _, _ in placed]
        return UpdateTargets(
            targets=torch.tensor(placed, dtype=torch.int64),
            u=torch.cat([self.u[site].T for site in sites], 1).contiguous(),
            v=torch.cat([self.v[site] for site in sites]),
        )

    def forget_bases(self) -> None:
        """Give back the U and V, when all `targets` have been asked for, which have their own."""
        self.u.clear()
        self.v.clear()

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
            self.evictions += 1
        self.loads += 1
        return slot

    def _victim_or_fail(self) -> str:
        victim = self._victim()
        assert victim is not None, "acquire without can_acquire"
        return victim
