"""Losses of several adapters at once: the frozen head's logits are computed once for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from adapter_gen.apply import apply_paper
from training.paper.examples import UNSCORED, Examples
from training.paper.models import Adapter, LowRank
from training.statistics import Array

_CHUNK = 64
"""Rows at a time: their float32 logits stay near the processor's caches."""


@dataclass(frozen=True)
class Variant:
    """What is scored.

    Attributes:
        adapter: None scores the unadapted model.
        misled: take the condition of another batch, half of all batches further on.
    """

    adapter: Adapter | None = None
    misled: bool = False


@dataclass(frozen=True, eq=False)
class Rows:
    """Some scored positions: `hidden` bfloat16 [c, d], `base` float32 [c, V] logits, `targets`."""

    hidden: torch.Tensor
    base: torch.Tensor
    targets: torch.Tensor

    def nll(self, update: LowRank | None, alpha: float) -> torch.Tensor:
        """Loss float32 [c] of each, in nats, under one update for all of them."""
        logits = self.base
        if update is not None:
            logits = apply_paper(self.hidden, logits, update.a, update.b, alpha)
        return cross_entropy(logits, self.targets, reduction="none")


def rows_of(hidden: torch.Tensor, targets: torch.Tensor, head: torch.Tensor) -> Iterator[Rows]:
    """Chunks of positions: `hidden` [n, d] with `targets` [n], under the frozen `head` [V, d]."""
    for start in range(0, len(targets), _CHUNK):
        part = hidden[start : start + _CHUNK].to(head.dtype)
        yield Rows(part, (part @ head.T).float(), targets[start : start + _CHUNK])


@torch.inference_mode()
def token_losses(
    variants: Mapping[str, Variant],
    examples: Examples,
    head: torch.Tensor,
    alpha: float,
    label: str | None = None,
) -> dict[str, Array]:
    """Loss [N, P] of every position under every variant, in nats; NaN where nothing is scored.

    Args:
        variants: adapters are put into evaluation mode.
        examples: in batches.
        head: [V, d], the frozen LM head.
        alpha: of the spec.
        label: of a progress bar; None shows none.
    """
    losses = {name: np.full(tuple(examples.targets.shape), np.nan) for name in variants}
    count = len(examples.batches)
    bar = tqdm(total=count, desc=label, unit="batch", disable=label is None)
    for number, rows in enumerate(examples.batches):
        updates = {}
        for name, variant in variants.items():
            source = (number + count // 2) % count if variant.misled else number
            updates[name] = _update(variant, examples.condition(source))
        targets = examples.targets[rows]
        scored = targets != UNSCORED
        places = torch.nonzero(scored).numpy()
        where = (rows.numpy()[places[:, 0]], places[:, 1])
        found: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] for name in variants}
        for chunk in rows_of(examples.hidden[rows][scored], targets[scored], head):
            for name, update in updates.items():
                found[name].append(chunk.nll(update, alpha))
        for name, parts in found.items():
            losses[name][where] = torch.cat(parts).double().numpy()
        bar.update()
    bar.close()
    return losses


def _update(variant: Variant, condition: torch.Tensor) -> LowRank | None:
    return None if variant.adapter is None else variant.adapter.eval()(condition)


def mean_of_batches(losses: Array, examples: Examples) -> float:
    """The published average: of each batch's mean, however many positions it scores."""
    parts = [losses[rows.numpy()] for rows in examples.batches]
    return float(np.mean([np.nanmean(part) for part in parts if not np.isnan(part).all()]))


def mean_of_tokens(losses: Array, examples: Examples) -> float:  # noqa: ARG001
    """The honest average: every scored position counts the same."""
    return float(np.nanmean(losses))
