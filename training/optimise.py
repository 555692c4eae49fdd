"""One stage of training: AdamW, warm-up and cosine decay, early stopping, best step kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster_router.wire.errors import SetupError
from training.checkpoints import Saved
from training.config import StageSettings
from training.progress import Progress
from training.runtime import Runtime
from training.shares import B, Batches, Share, Split, to_device

_WARMUP = 0.05
"""Share of the steps in which the learning rate rises to its peak."""

State = dict[str, Tensor]


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

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> StageResult:
        """What `as_json` gave."""
        curve = tuple((int(step), train, held) for step, train, held in record["curve"])
        return cls(record["best_loss"], record["best_step"], record["steps"], curve)


class Stage(Generic[B]):
    """One stage of training.

    Mixed precision is torch's autocast, gradients are exchanged by DistributedDataParallel and
    accumulated under its `no_sync`. (Accelerate wraps the same three, but keeps the precision in a
    global of the process and leaves the module's `forward` patched.)

    Args:
        name: shown, reported, and the name of its checkpoint.
        settings: steps, rates and patience.
        module: what is trained; `module(batch)` gives the losses float32 [n] of the batch's tokens
            in nats, and a penalty (a scalar, a mean over its documents). Afterwards it holds the
            best step's weights.
        groups: parameters and the factor on the learning rate of each group; all else is frozen.
        penalty: weight of the penalty in what is minimised.
    """

    def __init__(
        self,
        name: str,
        settings: StageSettings,
        module: nn.Module,
        groups: Sequence[tuple[nn.Module, float]],
        penalty: float = 0.0,
    ) -> None:
        self.name = name
        self.settings = settings
        self.module = module
        self.penalty = penalty
        trained = [(list(part.parameters()), factor) for part, factor in groups if factor > 0]
        module.requires_grad_(False)
        for parameters, _ in trained:
            for parameter in parameters:
                parameter.requires_grad_(True)
        rate = settings.learning_rate
        self.parameters = [parameter for parameters, _ in trained for parameter in parameters]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": parameters, "lr": rate * factor, "initial_lr": rate * factor}
                for parameters, factor in trained
            ],
            weight_decay=settings.weight_decay,
        )

    def run(
        self, batches: Batches[B], validate: Callable[[], float], runtime: Runtime
    ) -> StageResult:
        """Train until the steps or the patience are used up, from the last checkpoint if any.

        Args:
            batches: global batches, of which each worker draws its share.
            validate: loss of the module, in nats per token; called in evaluation mode.
            runtime: the place to run in.

        Raises:
            SetupError: the loss became NaN or infinite; the last checkpoint is kept and named.
            ConfigError: a global batch has too few documents for the workers and `accumulate`.
        """
        saved = runtime.load(self.name)
        if saved is not None and saved.finished:
            load_state(self.module, _part(saved.tensors, "best"))
            return StageResult.from_json(saved.record)
        home = self.parameters[0].device
        # Dropout is seeded step by step; the process's own generator is left as it was.
        with torch.random.fork_rng():
            result = _Run(self, batches, validate, runtime, saved).train()
        self.module.to(home)
        return result

    def rate_factor(self, step: int) -> float:
        """Factor on the learning rate after `step` steps."""
        warmup = max(1, round(_WARMUP * self.settings.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.settings.steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class _Run(Generic[B]):
    """A stage under way: from a checkpoint, or from the start, to its last step."""

    def __init__(
        self,
        stage: Stage[B],
        batches: Batches[B],
        validate: Callable[[], float],
        runtime: Runtime,
        saved: Saved | None,
    ) -> None:
        self._stage = stage
        self._settings = stage.settings
        self._batches = batches
        self._validate = validate
        self._runtime = runtime
        self._kept: int | None = None
        self._prepared = runtime.prepare(stage.module)
        if saved is None:
            self._result = StageResult(self._validation(0), 0, 0, ())
            self._best = trained_state(stage.module)
        else:
            self._result = StageResult.from_json(saved.record)
            self._best = _part(saved.tensors, "best")
            self._kept = self._result.steps
            load_state(stage.module, _part(saved.tensors, "module"))
            _load_optimiser(stage.optimiser, _part(saved.tensors, "optimiser"))
        # Made from the step alone, so that a resumed stage may have another learning rate.
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            stage.optimiser, stage.rate_factor, last_epoch=self._result.steps - 1
        )

    def train(self) -> StageResult:
        """Take all steps; the module then holds the best weights."""
        with Progress(
            self._stage.name,
            self._settings.steps,
            self._result.steps,
            shown=self._runtime.rank == 0,
        ) as progress:
            while not self._finished():
                self._advance(progress)
        load_state(self._stage.module, self._best)
        return self._result

    def _finished(self) -> bool:
        steps, stale = self._result.steps, self._result.steps - self._result.best_step
        patience = self._settings.patience * self._settings.evaluate_every
        return steps >= self._settings.steps or stale >= patience

    def _advance(self, progress: Progress) -> None:
        """Steps up to the next validation, and a checkpoint."""
        before = self._result
        last = min(before.steps + self._settings.evaluate_every, self._settings.steps)
        losses = [self._step(step, progress) for step in range(before.steps + 1, last + 1)]
        trained, loss = math.fsum(losses) / len(losses), self._validation(last)
        better = loss < before.best_loss
        self._result = StageResult(
            loss if better else before.best_loss,
            last if better else before.best_step,
            last,
            (*before.curve, (last, trained, loss)),
        )
        if better:
            self._best = trained_state(self._stage.module)
        self._save(trained, loss)
        progress.show(train=trained, best=self._result.best_loss)

    def _step(self, step: int, progress: Progress) -> float:
        """One update of the weights; the loss of the global batch before it."""
        split = Split(self._runtime.rank, self._runtime.world, self._settings.accumulate)
        shares = self._batches.draw(step, split)
        self._stage.optimiser.zero_grad()
        summed = torch.zeros((), device=self._runtime.device)
        for number, share in enumerate(shares):
            with self._synchronised(last=number == len(shares) - 1):
                summed += self._backward(share)
        loss = float(self._runtime.total(summed))
        norm = nn.utils.clip_grad_norm_(self._stage.parameters, self._settings.clip)
        self._check("loss", loss, step)
        self._check("gradient", float(norm), step)
        self._stage.optimiser.step()
        self._schedule.step()
        progress.step(shares[0].all_tokens)
        return loss

    def _backward(self, share: Share[B]) -> Tensor:
        """Add the gradient of one share; returns its part of the global batch's mean loss."""
        torch.manual_seed(share.seed)
        device = self._runtime.device
        half = self._settings.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            losses, penalty = self._prepared(to_device(share.batch, device))
            loss = losses.float().mean() * share.of_tokens
            penalty = penalty.float() * share.of_documents
        # Gradients are averaged over the workers, while the shares of all workers sum to one.
        scale = float(self._runtime.world)
        ((loss + self._stage.penalty * penalty) * scale).backward()
        return loss.detach()

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        """Gradients are exchanged once, after the last share of a step."""
        if isinstance(self._prepared, DistributedDataParallel) and not last:
            exchange: AbstractContextManager[None] = self._prepared.no_sync()
            return exchange
        return nullcontext()

    def _validation(self, step: int) -> float:
        """The validation loss that all workers agree on."""
        with _evaluating(self._stage.module):
            own = torch.tensor(self._validate(), dtype=torch.float64).to(self._runtime.device)
        loss = float(self._runtime.total(own)) / self._runtime.world
        self._check("validation loss", loss, step)
        return loss

    def _check(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        where = self._runtime.checkpoints
        if self._kept is None or where is None:
            kept = "no checkpoint was kept"
        else:
            kept = f"the last good checkpoint is of step {self._kept}, in {where}"
        raise SetupError(
            f"the {what} of stage {self._stage.name} is {value} at step {step}; "
            f"lower its learning_rate or clip ({kept})"
        )

    def _save(self, trained: float, loss: float) -> None:
        finished = self._finished()
        tensors = {f"best.{name}": tensor for name, tensor in self._best.items()}
        if not finished:
            current = trained_state(self._stage.module)
            tensors |= {f"module.{name}": tensor for name, tensor in current.items()}
            tensors |= _optimiser_state(self._stage.optimiser)
        saved = Saved(tensors, self._result.as_json(), finished)
        metrics = {"train": trained, "validation": loss, "step": float(self._result.steps)}
        self._runtime.save(self._stage.name, saved, metrics)
        self._kept = self._result.steps


def trained_state(module: nn.Module) -> State:
    """A copy on the CPU of what training changes in `module`: no frozen parameter is in it."""
    frozen = {name for name, value in module.named_parameters() if not value.requires_grad}
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in module.state_dict().items()
        if name not in frozen
    }


def load_state(module: nn.Module, state: State) -> None:
    """Put back what `trained_state` gave."""
    unexpected = module.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected, unexpected


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each part is in the mode it was in (a frozen LM never trains)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    yield
    for part, training in modes:
        part.training = training


def _optimiser_state(optimiser: torch.optim.Optimizer) -> State:
    return {
        f"optimiser.{index}.{name}": value.detach().to("cpu", copy=True)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }


def _load_optimiser(optimiser: torch.optim.Optimizer, state: State) -> None:
    """Moments and step counts come from `state`, rates from the settings."""
    values: dict[int, State] = {}
    for name, value in state.items():
        index, _, leaf = name.partition(".")
        values.setdefault(int(index), {})[leaf] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": values, "param_groups": groups})


def _part(tensors: State, prefix: str) -> State:
    start = prefix + "."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
