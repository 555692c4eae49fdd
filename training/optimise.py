"""One stage of training: AdamW, warm-up and cosine decay, early stopping, best step kept."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from cluster_router.wire.errors import SetupError
from training.config import StageSettings
from training.modules import AdaptedHead, Batch
from training.objective import CandidateSampler

_WARMUP = 0.05
"""Share of the steps in which the learning rate rises to its peak."""


class Runtime(Protocol):
    """Where a stage runs: this process, or one of several workers."""

    @property
    def rank(self) -> int:
        """Which worker this is; 0 shows progress."""
        ...

    def prepare(self, module: AdaptedHead) -> nn.Module:
        """`module`, wrapped so that its gradients are the mean over all workers."""
        ...

    def report(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Called after every validation."""
        ...


class InProcess:
    """A single worker: this process. Figures go to the progress bar alone."""

    rank = 0

    def prepare(self, module: AdaptedHead) -> nn.Module:
        """See `Runtime.prepare`."""
        return module

    def report(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Runtime.report`."""


class Batches(Protocol):
    """A source of training batches."""

    def draw(self) -> Batch:
        """The next batch."""
        ...


@dataclass(frozen=True)
class StageResult:
    """How a stage went: its best validation loss (nats per token), at which step, and the curve."""

    best_loss: float
    best_step: int
    steps: int
    curve: tuple[tuple[int, float, float], ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values; the curve holds (step, training loss, validation loss)."""
        return {
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "steps": self.steps,
            "curve": [list(point) for point in self.curve],
        }


class Stage:
    """One stage of training.

    Args:
        name: shown and reported.
        settings: steps, rates and patience.
        module: what is trained; afterwards it holds the best step's weights.
        groups: parameters and the factor on the learning rate of each group.
        core_penalty: weight of the mean square of the generated core in the loss.
        sampler: of the candidates the training loss normalises over; None for the whole vocabulary.
    """

    def __init__(
        self,
        name: str,
        settings: StageSettings,
        module: AdaptedHead,
        groups: Sequence[tuple[nn.Module, float]],
        core_penalty: float = 0.0,
        sampler: CandidateSampler | None = None,
    ) -> None:
        self._name = name
        self._settings = settings
        self._module = module
        self._penalty = core_penalty
        self._sampler = sampler
        trained = [(list(part.parameters()), factor) for part, factor in groups if factor > 0]
        module.requires_grad_(False)
        for parameters, _ in trained:
            for parameter in parameters:
                parameter.requires_grad_(True)
        rate = settings.learning_rate
        self._parameters = [p for parameters, _ in trained for p in parameters if p.requires_grad]
        self._optimiser = torch.optim.AdamW(
            [{"params": parameters, "lr": rate * factor} for parameters, factor in trained],
            weight_decay=settings.weight_decay,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, self._factor)

    def run(self, batches: Batches, validate: Callable[[], float], runtime: Runtime) -> StageResult:
        """Train until the steps or the patience are used up.

        Raises:
            SetupError: the loss became NaN or infinite.
        """
        prepared = runtime.prepare(self._module)
        best = StageResult(validate(), 0, 0, ())
        state = copy.deepcopy(self._module.state_dict())
        curve: list[tuple[int, float, float]] = []
        every, recent = self._settings.evaluate_every, 0.0
        with tqdm(
            range(1, self._settings.steps + 1), desc=self._name, disable=runtime.rank != 0
        ) as progress:
            for step in progress:
                recent += self._step(prepared, batches.draw(), step)
                if step % every and step != self._settings.steps:
                    continue
                loss, trained = validate(), recent / ((step - 1) % every + 1)
                recent = 0.0
                curve.append((step, trained, loss))
                runtime.report(self._name, step, {"train": trained, "validation": loss})
                if loss < best.best_loss:
                    best = StageResult(loss, step, step, ())
                    state = copy.deepcopy(self._module.state_dict())
                progress.set_postfix(train=f"{trained:.4f}", best=f"{best.best_loss:.4f}")
                if step - best.best_step >= self._settings.patience * every:
                    break
        self._module.load_state_dict(state)
        return StageResult(best.best_loss, best.best_step, step, tuple(curve))

    def _step(self, prepared: nn.Module, batch: Batch, step: int) -> float:
        if self._sampler is not None:
            batch = dataclasses.replace(batch, candidates=self._sampler.draw(batch.targets))
        losses, size = prepared(batch)
        loss = losses.mean()
        if not torch.isfinite(loss):
            raise SetupError(
                f"the loss of stage {self._name} is {loss.item()} at step {step}; "
                "lower its learning_rate or clip"
            )
        self._optimiser.zero_grad()
        (loss + self._penalty * size).backward()
        nn.utils.clip_grad_norm_(self._parameters, self._settings.clip)
        self._optimiser.step()
        self._schedule.step()
        return float(loss.detach())

    def _factor(self, step: int) -> float:
        warmup = max(1, round(_WARMUP * self._settings.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self._settings.steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
