"""Settings of the CentroidLearner."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LearnerConfig(BaseModel):
    """How clusters follow the traffic. Time is counted in prompts, so a replay repeats itself.

    Attributes:
        max_clusters: clusters there may be at once. At this number a new one takes the place of
            the least useful, if it is worth twice as much.
        memory: prompts a cluster's centroid remembers: each new one counts at least 1/memory.
        window: most recent embeddings kept in memory (never on disk), on which structure is judged.
        interval: prompts between two looks at the structure.
        min_size: prompts of the window a cluster must have to be spawned or split off.
        split_gain: share of all dispersion (cosine distance of prompts to their centroids, summed
            over the window) that a cluster must remove to be split off or spawned.
        merge_loss: share of all dispersion that making two clusters one may add.
        idle: prompts after which a cluster that received none is retired.
        drift: how far a centroid may turn before its update is generated anew, as a share of the
            mean cosine distance between prompts and their centroids.
        growth: factor by which a cluster's support may grow before its update is generated anew.
        settled: support from which growth no longer changes an update enough to matter.
        centre_after: prompts after which embeddings are compared as they differ from the mean of
            all traffic, which tells topics apart better; None: never.
        threshold_percentile: percentage of assigned traffic that the similarity threshold cuts off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_clusters: Annotated[int, Field(gt=0, le=4096)] = 64
    memory: Annotated[int, Field(gt=0)] = 500
    window: Annotated[int, Field(gt=0)] = 4096
    interval: Annotated[int, Field(gt=0)] = 512
    min_size: Annotated[int, Field(ge=2)] = 8
    split_gain: Annotated[float, Field(gt=0, lt=1)] = 0.001
    merge_loss: Annotated[float, Field(ge=0, lt=1)] = 0.0003
    idle: Annotated[int, Field(gt=0)] = 16_384
    drift: Annotated[float, Field(gt=0)] = 0.5
    growth: Annotated[float, Field(gt=1)] = 8.0
    settled: Annotated[int, Field(ge=0)] = 64
    centre_after: Annotated[int, Field(gt=0)] | None = 512
    threshold_percentile: Annotated[float, Field(ge=0, lt=50)] = 0.5

    @model_validator(mode="after")
    def _consistent(self) -> LearnerConfig:
        if self.merge_loss >= self.split_gain:
            raise ValueError(
                "merge_loss must be less than split_gain, or what was split is merged again"
            )
        if self.window < 2 * self.min_size:
            raise ValueError("window must hold two clusters of min_size")
        return self
