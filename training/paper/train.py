"""Training of the adapters on cached states, all of them on the same batches in lockstep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from cluster_router.wire.errors import SetupError
from training.paper.examples import UNSCORED, Examples, Splits
from training.paper.models import Adapter
from training.paper.scoring import Variant, rows_of, token_losses
from training.paper.settings import PaperSettings
from training.statistics import Array

Measure = Callable[[Array, Examples], float]
"""Losses [N, P] of examples to the figure that chooses the epoch."""


@dataclass
class Trainee:
    """An adapter in training.

    Attributes:
        curve: validation loss after each epoch.
        best: state after the epoch with the lowest.
    """

    adapter: Adapter
    optimiser: torch.optim.Optimizer
    curve: list[float] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter, learning_rate: float) -> Trainee:
        """With AdamW at its defaults, as in the authors' code."""
        return cls(adapter, torch.optim.AdamW(adapter.parameters(), lr=learning_rate))

    def record(self, loss: float) -> None:
        """Take in an epoch's validation loss."""
        if not self.curve or loss < min(self.curve):
            self.best = copy.deepcopy(self.adapter.state_dict())
        self.curve.append(loss)


def train(
    adapters: Mapping[str, Adapter],
    splits: Splits,
    measure: Measure,
    head: torch.Tensor,
    settings: PaperSettings,
    seed: int,
    label: str,
) -> dict[str, list[float]]:
    """Train each adapter and leave it at its best epoch.

    Args:
        adapters: by name; changed in place.
        splits: in batches, which keep their order from epoch to epoch.
        measure: how validation losses are averaged; chooses the epoch.
        head: [V, d], frozen.
        settings: optimiser, epochs, positions per step.
        seed: of the positions and of dropout.
        label: of the progress bar.

    Returns:
        Validation loss of every adapter after every epoch, in nats.

    Raises:
        SetupError: a loss became NaN or infinite.
    """
    training, validation = splits
    torch.manual_seed(seed)
    trainees = {name: Trainee.of(a, settings.learning_rate) for name, a in adapters.items()}
    alpha = settings.alpha * settings.rank
    variants = {name: Variant(adapter) for name, adapter in adapters.items()}
    steps = settings.epochs * len(training.batches)
    with tqdm(total=steps, desc=label, unit="step") as progress:
        for _ in range(settings.epochs):
            for adapter in adapters.values():
                adapter.train()
            for batch in range(len(training.batches)):
                _step(trainees, training, batch, head, settings)
                progress.update()
            for name, losses in token_losses(variants, validation, head, alpha).items():
                trainees[name].record(measure(losses, validation))
            progress.set_postfix({name: f"{t.curve[-1]:.4f}" for name, t in trainees.items()})
    for trainee in trainees.values():
        trainee.adapter.load_state_dict(trainee.best)
    return {name: trainee.curve for name, trainee in trainees.items()}


def _step(
    trainees: Mapping[str, Trainee],
    training: Examples,
    batch: int,
    head: torch.Tensor,
    settings: PaperSettings,
) -> None:
    """One optimiser step of every trainee on the same positions of the same texts."""
    rows = training.batches[batch]
    columns = torch.randperm(training.targets.shape[1])[: settings.positions]
    targets = training.targets[rows][:, columns]
    scored = targets != UNSCORED
    if not scored.any():
        return
    hidden = training.hidden[rows][:, columns][scored]
    condition = training.condition(batch)
    generated = {name: trainee.adapter(condition) for name, trainee in trainees.items()}
    leaves = {name: update.leaf() for name, update in generated.items()}
    for chunk in rows_of(hidden, targets[scored], head):
        for name, leaf in leaves.items():
            nll = chunk.nll(leaf, settings.alpha * settings.rank).sum() / len(hidden)
            if not torch.isfinite(nll):
                raise SetupError(f"the loss of {name} is {nll.item()}; lower --learning-rate")
            nll.backward()
    for name, trainee in trainees.items():
        trainee.optimiser.zero_grad()
        generated[name].continue_from(leaves[name])
        trainee.optimiser.step()
