"""What is trained: the shared bases as parameters, and the loss of a batch under the update."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapter_gen.apply import apply_head
from adapter_gen.hypernetwork import CoreHypernetwork
from adapter_gen.update import SharedBases
from training.clusters import Conditions
from training.metric import Metric
from training.objective import Candidates, head_nll


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
    """The shared parts of a `head`-depth update as trainable parameters, in whitened coordinates.

    Args:
        bases: where to start; with a metric, U, V and the shift are given in its coordinates.
        metric: None for plain coordinates.
    """

    def __init__(self, bases: SharedBases, metric: Metric | None = None) -> None:
        super().__init__()
        self.metric = metric or Metric.identity(len(bases.shift))
        self.u = nn.Parameter(bases.u[-1].clone())
        self.v = nn.Parameter(bases.v[-1].clone())
        self.s0 = nn.Parameter(bases.s0.clone())
        self.shift = nn.Parameter(bases.shift.clone())

    def shared(self) -> SharedBases:
        """The parameters as bases in plain coordinates: gradients flow through."""
        return SharedBases(
            u=(self.metric.output @ self.u,),
            v=(self.v @ self.metric.input,),
            s0=self.s0,
            shift=self.metric.output @ self.shift,
        )

    @torch.no_grad()
    def frozen(self) -> SharedBases:
        """A detached copy in plain coordinates."""
        bases = self.shared()
        return SharedBases(
            u=(bases.u[0].clone(),),
            v=(bases.v[0].clone(),),
            s0=bases.s0.detach().clone(),
            shift=bases.shift.clone(),
        )


class AdaptedHead(nn.Module):
    """Loss per token of a batch whose hidden states pass through the update and the frozen head.

    Args:
        bases: shared parts.
        hypernetwork: generates the rest, its shift in the coordinates of `bases`; None trains the
            static update alone.
        weight: [vocabulary, d], the frozen LM head.
    """

    def __init__(
        self, bases: HeadBases, hypernetwork: CoreHypernetwork | None, weight: Tensor
    ) -> None:
        super().__init__()
        self.bases = bases
        self.hypernetwork = hypernetwork
        self._weight = (weight,)  # in a tuple, so that the frozen head is no part of the state

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses float32 [n] in nats, and the mean square of the generated core (a scalar)."""
        (weight,) = self._weight
        core, shift, size = None, None, torch.zeros(())
        if self.hypernetwork is not None and batch.conditions is not None:
            generated = self.hypernetwork(batch.conditions.vectors, batch.conditions.support)
            core = generated.cores[batch.owner, -1]
            shift = (generated.shift @ self.bases.metric.output)[batch.owner]
            size = generated.cores.square().sum(dim=(1, 2, 3)).mean()
        adapted = apply_head(batch.hidden.float(), self.bases.shared(), core, shift)
        nll = head_nll if batch.candidates is None else batch.candidates.nll
        return nll(adapted.to(weight.dtype), weight, batch.targets), size

    @torch.no_grad()
    def unwhitened(self) -> CoreHypernetwork:
        """A copy of the hypernetwork whose shift is in plain coordinates."""
        assert self.hypernetwork is not None
        plain = copy.deepcopy(self.hypernetwork)
        plain.shift.weight.copy_(self.bases.metric.output @ plain.shift.weight)
        return plain
