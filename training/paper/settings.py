"""Settings of a reproduction, and what the paper printed."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]

PUBLISHED_LOSS: Final = {"base": 10.2513, "lora": 1.3528, "hyper": 0.3753}
"""Validation losses of the paper's table: GPT-2 small, WikiText-2."""
PUBLISHED_PARAMETERS: Final = {"base": 124_439_808, "lora": 204_100, "hyper": 6_786_596}


class PaperSettings(BaseModel):
    """A run. Up to `kmeans_iterations` the defaults are the paper's; None means all there is.

    Attributes:
        length: tokens of a published sequence, and of an honest window.
        alpha: factor of B A h. The authors' code does not divide it by the rank.
        dropout: between the hypernetwork's layers, while it trains.
        kmeans_iterations: over a whole split, which is clustered into (sequences // batch) clusters
            that are then cut into batches.
        context: tokens of an honest window that are not scored; the condition sees only these.
        positions: scored positions drawn from each sequence, for the published loss over every
            position and in each honest training step. Figures never depend on this draw, except
            those of every position.
        seeds: runs; figures are means over them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    batch: Positive = 32
    length: AtLeastTwo = 256
    epochs: Positive = 10
    rank: Positive = 4
    alpha: Annotated[float, Field(gt=0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    kmeans_iterations: Positive = 10
    context: Positive = 128
    positions: Positive = 16
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    train_sequences: AtLeastTwo | None = None
    validation_sequences: AtLeastTwo | None = None
    train_windows: AtLeastTwo | None = None
    validation_windows: AtLeastTwo = 64
    test_windows: AtLeastTwo = 512


QUICK: Final = {
    "train_sequences": 64,
    "validation_sequences": 48,
    "train_windows": 32,
    "validation_windows": 8,
    "test_windows": 24,
    "positions": 8,
}
"""Settings that show the whole run in about two minutes on one core; its figures mean little."""
