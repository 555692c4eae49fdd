"""Summed loss of windows under any update, by running the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from adapter_gen.hypernetwork import Generated
from adapter_gen.language_model import AdaptedLM, ScoredTokens
from adapter_gen.update import SharedBases, UpdateSpec
from training.base import FrozenBase
from training.data import Window


@dataclass(frozen=True)
class WindowScorer:
    """Scores windows with one base model.

    Args:
        base: the model.
        spec: shape of the updates.
        batch: windows in one forward pass; those of like length share one.
    """

    base: FrozenBase
    spec: UpdateSpec
    batch: int = 8

    def score(
        self,
        windows: Sequence[Window],
        bases: SharedBases | None,
        generated: Generated | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Nats [N] over the scored tokens of each window.

        Args:
            windows: what to score.
            bases: shared parts of the update; None scores the unadapted model.
            generated: one update for all windows, or one each; None is the static update.
            progress: called with the number of tokens of every pass.
        """
        lm = AdaptedLM(self.base.model, self.spec)
        order = sorted(range(len(windows)), key=lambda i: len(windows[i].tokens))
        sums = np.zeros(len(windows))
        for first in range(0, len(order), self.batch):
            chosen = order[first : first + self.batch]
            sums[chosen] = self._sums(lm, [windows[i] for i in chosen], bases, generated, chosen)
            if progress is not None:
                progress(sum(len(windows[i].tokens) for i in chosen))
        return sums

    @torch.inference_mode()
    def _sums(
        self,
        lm: AdaptedLM,
        windows: Sequence[Window],
        bases: SharedBases | None,
        generated: Generated | None,
        rows: Sequence[int],
    ) -> list[float]:
        sequences = [torch.from_numpy(window.tokens.astype(np.int64)) for window in windows]
        scored = ScoredTokens.of(sequences, [window.context for window in windows])
        losses = lm.losses(scored, bases, _take(generated, rows)).double().cpu()
        parts = losses.split([window.scored for window in windows])
        return [float(part.sum()) for part in parts]


def _take(generated: Generated | None, rows: Sequence[int]) -> Generated | None:
    if generated is None:
        return None
    fields = {}
    for name in ("cores", "shift", "lora_a", "lora_b"):
        tensor: torch.Tensor | None = getattr(generated, name)
        if tensor is not None:
            fields[name] = tensor if len(tensor) == 1 else tensor[list(rows)]
    return Generated(**fields)
