"""Refinement: a few gradient steps on a cluster's cores, over the cluster's own earlier prompts.

The shared bases stay as they are, so a refined update is of the same form and size as a generated
one. It starts from what the hypernetwork generates. A part of the prompts is held back to choose
how far to go, and going nowhere is always among the choices: a cluster whose prompts teach nothing
keeps the update it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from adapter_gen.hypernetwork import Generated
from adapter_gen.language_model import AdaptedLM, ScoredTokens
from adapter_gen.update import SharedBases, UpdateSpec
from cluster_router.wire.errors import ConfigError, DeltaError

Prompt = NDArray[np.int32]


class RefineConfig(BaseModel):
    """How far and how carefully to refine.

    Attributes:
        steps: most steps of Adam, the learning rate falling linearly to zero.
        passes: how often at most each prompt is learned from: where they are few, fewer steps are
            taken. None sets no such bound.
        learning_rate: first step's rate for the cores; about the size of one step per number.
        batch: prompts in one step.
        skip: tokens at the start of a prompt that are read but not learned from; at most half of
            it. How texts of a kind begin is soon learned and helps nothing that comes later.
        held_back: share of the prompts that chooses the scale.
        scales: how far along the way found to go; 0 is always among the choices.
        min_prompts: with fewer, nothing is refined.
        margin: what the held-back loss must gain over the start, in standard errors of the gain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: Annotated[int, Field(ge=1)] = 12
    passes: Annotated[float, Field(gt=0)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.03
    batch: Annotated[int, Field(ge=1)] = 16
    skip: Annotated[int, Field(ge=0)] = 32
    held_back: Annotated[float, Field(gt=0, lt=1)] = 0.25
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (0.33, 0.67, 1.0)
    min_prompts: Annotated[int, Field(ge=2)] = 8
    margin: Annotated[float, Field(ge=0)] = 1.0

    def steps_for(self, prompts: int) -> int:
        """Steps that are taken where there are so many prompts to learn from."""
        if self.passes is None:
            return self.steps
        return min(self.steps, max(1, round(self.passes * prompts / self.batch)))


@dataclass(frozen=True, eq=False)
class Refined:
    """Outcome of a refinement.

    Attributes:
        generated: one update (B = 1), detached; the start itself where nothing was gained.
        scale: how far along the way found it went; 0 kept the start.
        gain: fall of the held-back loss, nats per token.
        tokens: scored tokens of the prompts learned from.
    """

    generated: Generated
    scale: float
    gain: float
    tokens: int


class Refiner:
    """Refines updates of one bundle.

    Args:
        model: the frozen base model, a transformers causal LM.
        spec: shape of the updates, of depth `head` or `full`.
        bases: the shared parts; never changed.
        config: how far to go.
        seed: of the order of prompts.

    Raises:
        ConfigError: the spec is the paper's form, which has no cores.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: UpdateSpec,
        bases: SharedBases,
        config: RefineConfig | None = None,
        seed: int = 0,
    ) -> None:
        if spec.depth == "paper":
            raise ConfigError("the paper's update has no cores to refine", "depth")
        self._lm = AdaptedLM(model, spec)
        self._spec = spec
        self._bases = bases
        self._config = config or RefineConfig()
        self._seed = seed

    def refine(self, prompts: Sequence[Prompt], start: Generated | None = None) -> Refined:
        """Refine `start` (None: the static update) on prompts of one cluster.

        Args:
            prompts: int32 token ids of each; those of fewer than two tokens teach nothing.
            start: one update (B = 1).

        Raises:
            DeltaError: the loss or a gradient is NaN or infinite.
        """
        first = self._zeros() if start is None else start
        usable = [prompt for prompt in prompts if len(prompt) > 1]
        if len(usable) < self._config.min_prompts:
            return Refined(first, 0.0, 0.0, 0)
        order = np.random.default_rng([self._seed, len(usable)]).permutation(len(usable))
        shuffled = [usable[i] for i in order]
        held = max(1, round(self._config.held_back * len(shuffled)))
        kept, learned = shuffled[:held], shuffled[held:]
        way = self._descend(learned, first)
        scale, gain = self._choose(kept, first, way)
        tokens = sum(len(prompt) - self._first(prompt) for prompt in learned)
        return Refined(_along(first, way, scale), scale, gain, tokens)

    def _descend(self, prompts: Sequence[Prompt], start: Generated) -> Generated:
        """Where descent leads from `start`."""
        assert start.cores is not None
        cores = start.cores.detach().clone().requires_grad_()
        config = self._config
        optimiser = torch.optim.Adam([cores], lr=config.learning_rate, betas=(0.9, 0.95))
        steps = config.steps_for(len(prompts))
        for step, batch in enumerate(_cycle(prompts, config.batch, steps)):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * (1 - step / steps)
            loss = self._losses(batch, Generated(cores=cores, shift=start.shift)).mean()
            optimiser.zero_grad()
            loss.backward()
            assert cores.grad is not None
            if not (torch.isfinite(loss) and torch.isfinite(cores.grad).all()):
                raise DeltaError(f"refinement met a loss of {loss.item()} at step {step + 1}")
            optimiser.step()
        return Generated(cores=cores.detach(), shift=start.shift)

    @torch.no_grad()
    def _choose(
        self, prompts: Sequence[Prompt], start: Generated, way: Generated
    ) -> tuple[float, float]:
        """The scale with the lowest held-back loss and its gain; 0 unless the gain is clear."""
        base = self._means(prompts, start)
        best = (0.0, 0.0)
        for scale in self._config.scales:
            gains = base - self._means(prompts, _along(start, way, scale))
            gain = float(gains.mean())
            spread = float(gains.std()) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
            if gain > best[1] and gain > self._config.margin * spread:
                best = (scale, gain)
        return best

    def _means(self, prompts: Sequence[Prompt], update: Generated) -> Tensor:
        """Mean loss float64 [N] of each prompt."""
        means = []
        for batch in _slices(sorted(prompts, key=len), self._config.batch):
            losses = self._losses(batch, update).double()
            counts = [len(prompt) - self._first(prompt) for prompt in batch]
            means += [part.mean() for part in losses.split(counts)]
        return torch.stack(means)

    def _losses(self, prompts: Sequence[Prompt], update: Generated) -> Tensor:
        sequences = [torch.from_numpy(prompt.astype(np.int64)) for prompt in prompts]
        scored = ScoredTokens.of(sequences, [self._first(prompt) for prompt in prompts])
        return self._lm.losses(scored, self._bases, update)

    def _first(self, prompt: Prompt) -> int:
        """The first token that is learned from."""
        return max(1, min(self._config.skip, len(prompt) // 2))

    def _zeros(self) -> Generated:
        rank = self._spec.rank
        return Generated(
            cores=torch.zeros(1, len(self._spec.sites), rank, rank),
            shift=torch.zeros(1, self._spec.hidden_size),
        )


def _along(start: Generated, way: Generated, scale: float) -> Generated:
    assert start.cores is not None
    assert way.cores is not None
    return Generated(cores=start.cores + scale * (way.cores - start.cores), shift=start.shift)


def _slices(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for first in range(0, len(prompts), size):
        yield prompts[first : first + size]


def _cycle(prompts: Sequence[Prompt], size: int, steps: int) -> Iterator[list[Prompt]]:
    """`steps` batches, round and round."""
    for step in range(steps):
        yield [prompts[(step * size + i) % len(prompts)] for i in range(min(size, len(prompts)))]
