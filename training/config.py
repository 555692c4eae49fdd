"""Settings of a training run, read from YAML. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapter_gen.hypernetwork import CoreConfig, MemoryConfig
from adapter_gen.refine import RefineConfig
from cluster_router.wire.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(_Settings):
    """Which documents are read, and how each is cut.

    A document is the text of a row; its domain is the name of the file, unless a column names it.
    The same text is never kept twice; one in two splits stays in the earlier.

    Attributes:
        text_column: of the text.
        group_column: of the source. Where the data has no splits of its own, documents are given to
            splits by a hash of it, up to its last `#`; without it each document stands alone.
        domain_column: of the domain; None takes the name of the file.
        near_duplicates: what to do with texts that share 60 % of their runs of five words: drop
            them, keep them, or drop them where the data has no splits of its own (`auto`).
        exclude: domains that are never trained on, whatever else is asked for (their licence
            forbids it), as shell-style patterns. Evaluated as unseen.
        holdout: domains, as patterns, kept apart to measure unseen ones. Which of them the data
            lacks is logged.
        context_tokens: beginning of a document that chooses its cluster; at most half of it.
        scored_tokens: most tokens after the context that are learned from, or scored.
        windows_per_document: most that a long training document gives; validation and test use
            the first alone.
        dialogues: domains whose documents are a question and an answer, and what stands between
            the two.
        dialogue_share: share of these that depth `full` trains on in the model's chat format, so
            that the update does not unlearn it.
        train_documents: most of each domain.
        validation_documents: most of each domain; they choose when to stop and how far to go.
        test_documents: most of each domain.
    """

    text_column: Annotated[str, Field(min_length=1)] = "text"
    group_column: Annotated[str, Field(min_length=1)] = "source"
    domain_column: Annotated[str, Field(min_length=1)] | None = None
    near_duplicates: Literal["auto", "drop", "keep"] = "auto"
    exclude: tuple[str, ...] = ()
    holdout: tuple[str, ...] = ()
    context_tokens: Positive = 128
    scored_tokens: Positive = 256
    windows_per_document: Positive = 1
    dialogues: dict[str, str] = {}
    dialogue_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    train_documents: Annotated[int, Field(ge=2)] = 320
    validation_documents: Annotated[int, Field(ge=2)] = 32
    test_documents: Annotated[int, Field(ge=2)] = 64


class ClusterSettings(_Settings):
    """How training contexts are clustered into the bundle's first snapshot.

    Attributes:
        count: clusters.
        token_weights: of tokens in a prompt's embedding: all alike, or the rarer the heavier.
        threshold_percentile: a prompt less similar to its nearest centroid than this percentage of
            the training contexts were to theirs belongs to no cluster.
    """

    count: Positive = 48
    token_weights: Literal["uniform", "idf"] = "idf"
    threshold_percentile: Annotated[float, Field(ge=0, le=50)] = 1.0


class StageSettings(_Settings):
    """One stage of optimisation. A batch is `documents` times `positions` scored tokens.

    Attributes:
        steps: most steps.
        documents: in a batch, whatever the number of workers.
        positions: scored tokens of each of them.
        accumulate: passes in which a worker computes its share.
        precision: of the passes.
        candidates: how many of the most frequent tokens the training loss always normalises over,
            and how many of the others are sampled; None takes the whole vocabulary, as validation
            always does.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        clip: largest norm of a gradient.
        evaluate_every: steps after which the loss is validated and a checkpoint written.
        patience: validations without a better loss after which the stage ends.
    """

    steps: Positive = 400
    documents: Positive = 64
    positions: Positive = 24
    accumulate: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    candidates: tuple[Positive, Positive] | None = (4096, 3072)
    learning_rate: Rate = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    evaluate_every: Positive = 50
    patience: Positive = 4


class HyperSettings(StageSettings):
    """The second stage, in which the hypernetwork learns.

    It learns from episodes, clusterings of random subsets of the training contexts, and starts
    from a fit in closed form (see `training.least_squares`). The attributes of a stage hold too.

    Attributes:
        episodes: how many clusterings.
        clusters: fewest and most clusters in one.
        dropout: share of conditions replaced by none at all.
        core_penalty: on the squared size of generated cores.
        damping: regularises the curvature in the closed form.
        ridge: regularises its solution.
        scales: how far to go along it; the best on the validation documents is taken, 0 is always
            among them.
    """

    episodes: Positive = 32
    clusters: tuple[Positive, Positive] = (8, 256)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.15
    core_penalty: Annotated[float, Field(ge=0)] = 1e-3
    damping: Annotated[float, Field(gt=0)] = 0.5
    ridge: Annotated[float, Field(gt=0)] = 0.1
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (0.25, 0.375, 0.5, 0.75, 1.0)


class PrototypeSettings(_Settings):
    """The second stage at depth `full`: cores refined on each cluster, which the memory keeps.

    Attributes:
        documents: most windows of a cluster that are learned from.
        tokens: of each, from its start.
        refine: how a cluster's cores are refined.
        strengths: factors on the blend of cores, of which the best on the validation documents is
            taken; 0 is always among them. With none there is no second stage: every cluster gets
            the static update.
        sharpness: factors on similarities to try beside the hypernetwork's own.
    """

    documents: Positive = 64
    tokens: Annotated[int, Field(ge=2)] = 192
    refine: RefineConfig = RefineConfig()
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0)
    sharpness: tuple[Annotated[float, Field(gt=0)], ...] = ()


class TrainSettings(_Settings):
    """A whole run, at depth `head` (with a core hypernetwork) or `full` (with a memory).

    Attributes:
        model: the frozen base model, as the service's `model`.
        seed: of every random choice.
        workers: 0 trains in this process, N >= 1 in N Ray Train workers, [M, N] in as many from M
            to N as the cluster has room for. Each reserves a GPU where the cluster has any.
        worker_cpus: reserved by each worker; torch uses the whole ones.
        max_failures: workers that may die; the run goes on from the last checkpoint.
        depth: what is adapted: the final hidden state, or every linear.
        rank: of the update.
        data: which documents are read, and how each is cut.
        clusters: the bundle's first clusters.
        hypernetwork: of kind `core` at depth `head`, `memory` at depth `full`.
        static: the first stage, in which the update that all clusters share learns.
        hyper: the second stage at depth `head`.
        prototypes: the second stage at depth `full`.
    """

    model: str = "smollm2-135m-instruct"
    seed: Annotated[int, Field(ge=0)] = 0
    workers: Annotated[int, Field(ge=0)] | tuple[Positive, Positive] = 0
    worker_cpus: Annotated[float, Field(gt=0)] = 0.5
    max_failures: Annotated[int, Field(ge=0)] = 2
    depth: Literal["head", "full"] = "head"
    rank: Positive = 32
    data: DataSettings = DataSettings()
    clusters: ClusterSettings = ClusterSettings()
    hypernetwork: CoreConfig | MemoryConfig = Field(default=CoreConfig(), discriminator="kind")
    static: StageSettings = StageSettings()
    hyper: HyperSettings = HyperSettings()
    prototypes: PrototypeSettings = PrototypeSettings()

    @model_validator(mode="after")
    def _kind_fits_depth(self) -> TrainSettings:
        expected = "core" if self.depth == "head" else "memory"
        if self.hypernetwork.kind != expected:
            raise ValueError(
                f"depth {self.depth} takes hypernetwork.kind {expected}, "
                f"not {self.hypernetwork.kind}"
            )
        return self


def load_settings(path: Path, **overrides: Any) -> TrainSettings:
    """Read a YAML file; `overrides` replace settings by dotted name (`data.holdout`).

    Raises:
        ConfigError: no such file, not YAML, an unknown key or a value out of range.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}", "config") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"the config {path} must be a mapping of settings", "config")
    for name, value in overrides.items():
        *parents, leaf = name.split(".")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    try:
        return TrainSettings.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}", where) from error
