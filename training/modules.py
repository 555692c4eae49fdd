"""What is trained: the shared bases as parameters, and the loss of a batch under the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapter_gen.apply import apply_head
from adapter_gen.hypernetwork import CoreHypernetwork
from adapter_gen.nll import head_nll
from adapter_gen.update import SharedBases
from training.clusters import Conditions
from training.objective import Candidates


@dataclass(frozen=True, eq=False)
class Batch:
    """Scored tokens and the condition each belongs to.

    Attributes:
        hidden: bfloat16 [n, d].
        targets: int64 [n].
        owner: int64 [n], row of `conditions`.
        conditions: of the batch's documents; None asks for the static update.
        candidates: tokens that stand for the vocabulary; None takes all of it, exactly.
    """

    hidden: Tensor
    targets: Tensor
    owner: Tensor
    conditions: Conditions | None = None
    candidates: Candidates | None = None


class HeadBases(nn.Module):
    """The shared parts of a `head`-depth update as trainable parameters."""

    def __init__(self, bases: SharedBases) -> None:
        super().__init__()
        self.u = nn.Parameter(bases.u[-1].clone())
        self.v = nn.Parameter(bases.v[-1].clone())
        self.s0 = nn.Parameter(bases.s0.clone())
        self.shift = nn.Parameter(bases.shift.clone())

    def shared(self) -> SharedBases:
        """The live parameters as bases: gradients flow through."""
        return SharedBases(u=(self.u,), v=(self.v,), s0=self.s0, shift=self.shift)

    def frozen(self) -> SharedBases:
        """A detached copy."""
        return SharedBases(
            u=(self.u.detach().clone(),),
            v=(self.v.detach().clone(),),
            s0=self.s0.detach().clone(),
            shift=self.shift.detach().clone(),
        )


class AdaptedHead(nn.Module):
    """Loss per token of a batch whose hidden states pass through the update and the frozen head.

    Attributes:
        weight: [vocabulary, d], the frozen LM head.

    Args:
        bases: shared parts.
        hypernetwork: generates the rest; None trains the static update alone.
        weight: [vocabulary, d], the frozen LM head.
    """

    weight: Tensor

    def __init__(
        self, bases: HeadBases, hypernetwork: CoreHypernetwork | None, weight: Tensor
    ) -> None:
        super().__init__()
        self.bases = bases
        self.hypernetwork = hypernetwork
        # Moves to a device with the module, and is no part of its state.
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses float32 [n] in nats, and the mean square of the generated core (a scalar)."""
        core, shift, size = None, None, torch.zeros(())
        if self.hypernetwork is not None and batch.conditions is not None:
            generated = self.hypernetwork(batch.conditions.vectors, batch.conditions.support)
            core, shift = generated.cores[batch.owner, -1], generated.shift[batch.owner]
            size = generated.cores.square().sum(dim=(1, 2, 3)).mean()
        return self.nll(self.adapt(batch.hidden, core, shift), batch), size

    def adapt(
        self, hidden: Tensor, core: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Hidden states float32 [n, d] under the static update, plus a generated one if given."""
        return apply_head(hidden.float(), self.bases.shared(), core, shift)

    def nll(self, adapted: Tensor, batch: Batch) -> Tensor:
        """Losses float32 [n] of adapted hidden states [n, d]."""
        nll = head_nll if batch.candidates is None else batch.candidates.nll
        return nll(adapted.to(self.weight.dtype), self.weight, batch.targets)
