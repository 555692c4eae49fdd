"""The hypernetwork's shift in closed form: its last factor fitted to the second-order loss.

The generated shift is linear in its last factor W: s(c) = gate(n) W f(c), with f the trunk's
features of the condition. Summed over clusters with mean gradients g, the second-order loss
g s + s H s / 2 is then smallest at W = -H^-1 G' F (F' F)^-1: one solve on each side. The trunk
keeps its random weights. Gradient descent may go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapter_gen.hypernetwork import CoreHypernetwork
from cluster_router.wire.types import FloatArray
from training.clusters import Conditions
from training.config import HyperSettings
from training.curvature import Curvature
from training.episodes import Episode


@dataclass(frozen=True, eq=False)
class Groups:
    """Clusters of many episodes: what they are conditioned on, and which way their loss falls.

    Attributes:
        conditions: of each cluster.
        gradients: float32 [G, d], mean gradient of the loss per token.
        weights: float32 [G], what share of the training documents each stands for.
    """

    conditions: Conditions
    gradients: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, episodes: Sequence[Episode], embeddings: FloatArray, curvature: Curvature
    ) -> Groups:
        """Every cluster of every episode; `embeddings` [N, d] are of the training contexts."""
        members = [cluster for episode in episodes for cluster in episode.clusters()]
        means = np.stack([embeddings[cluster].mean(0) for cluster in members])
        vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        support = torch.tensor([float(len(cluster)) for cluster in members])
        gradients = [curvature.group_gradient(torch.from_numpy(cluster)) for cluster in members]
        return cls(
            Conditions(torch.from_numpy(vectors), support),
            torch.stack(gradients),
            support / support.sum(),
        )


@torch.no_grad()
def solve_shift(
    hypernetwork: CoreHypernetwork, groups: Groups, inverse: Tensor, ridge: float
) -> Tensor:
    """The last factor [d, width] that is best for `groups`.

    Args:
        hypernetwork: gives the features.
        groups: what to fit.
        inverse: [d, d], inverse of the damped second derivative.
        ridge: added to each feature's second moment, as a share of their mean.
    """
    features = _gated_features(hypernetwork, groups.conditions)  # [G, width]
    weighted = features * groups.weights[:, None]
    moment = weighted.T @ features
    moment += ridge * moment.diagonal().mean() * torch.eye(len(moment))
    cross = weighted.T @ groups.gradients  # [width, d]
    return -(torch.linalg.solve(moment, cross) @ inverse).T


def _gated_features(hypernetwork: CoreHypernetwork, conditions: Conditions) -> Tensor:
    """What the last factor of the shift is applied to, times the gate: [G, width]."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    with hypernetwork.shift.register_forward_pre_hook(keep):
        hypernetwork(conditions.vectors, conditions.support)
    return seen[0] * hypernetwork.gate(conditions.support)[:, None]


@dataclass(frozen=True)
class StartResult:
    """The closed-form start: the scale taken, and the validation loss at each scale tried."""

    scale: float
    losses: dict[float, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values; the losses as pairs (scale, nats per token)."""
        return {"scale": self.scale, "losses": [list(pair) for pair in self.losses.items()]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> StartResult:
        """What `as_json` gave."""
        return cls(record["scale"], dict(record["losses"]))


def fit_start(
    hypernetwork: CoreHypernetwork,
    groups: Groups,
    curvature: Curvature,
    settings: HyperSettings,
    validate: Callable[[], float],
) -> StartResult:
    """Fit the shift of `hypernetwork` and keep it at the scale that validates best.

    The second-order loss is too hopeful far from the static update, hence the scale.
    """
    solved = solve_shift(hypernetwork, groups, curvature.inverse(settings.damping), settings.ridge)
    weight = hypernetwork.shift.weight.data
    losses = {}
    for scale in (0.0, *settings.scales):
        weight.copy_(scale * solved)
        losses[scale] = validate()
    best = min(losses, key=lambda scale: losses[scale])
    weight.copy_(best * solved)
    return StartResult(best, losses)
