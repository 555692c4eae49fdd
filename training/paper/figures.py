"""Figures of a reproduction over its seeds, JSON values only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.paper.examples import Examples
from training.statistics import RESAMPLES, Array, Bootstrap

GAINS = {
    "lora": ("base", "lora"),
    "lora_every": ("base", "lora_every"),
    "hyper": ("base", "hyper"),
    "net": ("lora", "hyper"),
    "conditioning": ("misled", "hyper"),
}
"""Gain: (worse, better). Positive where the second has the lower loss."""


@dataclass(frozen=True, eq=False)
class SeedRun:
    """What one seed gave.

    Attributes:
        curves: validation loss after each epoch, by kind of training and adapter.
        published: figures of the published protocol, by model.
        transferred: honest loss of those models, summed over each test window, in nats.
        honest: the same of the models trained honestly.
    """

    seed: int
    curves: dict[str, dict[str, list[float]]]
    published: dict[str, dict[str, float | None]]
    transferred: dict[str, Array]
    honest: dict[str, Array]


def figures(runs: Sequence[SeedRun], test: Examples) -> dict[str, Any]:
    """The three tables, and every seed by itself."""
    return {
        "published_protocol": {
            name: {
                figure: _mean([run.published[name][figure] for run in runs])
                for figure in runs[0].published[name]
            }
            for name in runs[0].published
        },
        "published_models_honest_loss": _table([run.transferred for run in runs], test),
        "honest_models_honest_loss": _table([run.honest for run in runs], test),
        "runs": [
            {"seed": run.seed, "published_protocol": run.published, "curves": run.curves}
            for run in runs
        ],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return round(float(np.mean(numbers)), 5) if numbers else None


def _table(runs: Sequence[dict[str, Array]], test: Examples) -> dict[str, Any]:
    """Loss of each model and what it gains on others, windows resampled in pairs."""
    windows, scored = test.targets.shape
    tokens = windows * scored
    bootstrap = Bootstrap(["test"] * windows, [scored] * windows, RESAMPLES, 0)
    sums = {name: np.mean([run[name] for run in runs], axis=0) for name in runs[0]}
    return {
        "nats_per_token": {
            name: round(float(values.sum()) / tokens, 5) for name, values in sums.items()
        },
        "by_seed": [
            {name: round(float(values.sum()) / tokens, 5) for name, values in run.items()}
            for run in runs
        ],
        "gains": {
            gain: bootstrap.mean(sums[worse] - sums[better]).as_json()
            for gain, (worse, better) in GAINS.items()
            if worse in sums and better in sums
        },
    }
