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

    `exclude` and `holdout` are shell-style patterns of domain names. Excluded domains are never
    trained on, whatever else is asked for (their licence forbids it); held-out domains could be,
    and are kept apart to measure unseen domains. Both are evaluated as unseen.

    A document is the text of a row in `text_column`. Its domain is the name of the file, or the
    value of `domain_column` where that is set. Where the data has no splits of its own, documents
    are given to splits by a hash of `group_column`, up to its last `#`; without that column each
    document stands alone.

    The same text is never kept twice. `near_duplicates` (texts that share 60 % of their runs of
    five words) are dropped too, kept, or dropped where the data has no splits of its own (`auto`);
    a text in two splits stays in the earlier one.

    `dialogues` names domains whose documents are a question and an answer, and what stands between
    the two. At depth `full`, `dialogue_share` of them are trained on in the model's chat format, so
    that the update does not unlearn it.

    A training document longer than a window gives up to `windows_per_document` of them;
    validation and test use the first alone.
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

    `threshold_percentile`: a prompt less similar to its nearest centroid than this share of the
    training contexts were to theirs belongs to no cluster.
    """

    count: Positive = 48
    token_weights: Literal["uniform", "idf"] = "idf"
    threshold_percentile: Annotated[float, Field(ge=0, le=50)] = 1.0


class StageSettings(_Settings):
    """One stage of optimisation. A batch is `documents` times `positions` scored tokens.

    That is the global batch, whatever the number of workers; each computes its share in
    `accumulate` passes, in `precision`. Every `evaluate_every` steps the loss is validated and a
    checkpoint written.

    `candidates` are the most frequent tokens that the training loss always normalises over, and how
    many of the others are sampled; None takes the whole vocabulary. Validation always does.
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

    Episodes are clusterings of random subsets of the training contexts; `clusters` bounds how many
    clusters they have. `dropout` is the share of conditions replaced by none at all.

    The stage starts from a fit in closed form (see `training.least_squares`): `damping` and `ridge`
    regularise it, and the best of `scales` on the validation documents is taken; 0 is always among
    them.
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

    Of each cluster, up to `documents` windows are learned from, the first `tokens` of each. The
    best of `strengths` (0 is always among them), at the hypernetwork's sharpness or one of
    `sharpness`, on the validation documents is taken. With no strengths there is no second
    stage: every cluster gets the static update.
    """

    documents: Positive = 64
    tokens: Annotated[int, Field(ge=2)] = 192
    refine: RefineConfig = RefineConfig()
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 1.0)
    sharpness: tuple[Annotated[float, Field(gt=0)], ...] = ()


class TrainSettings(_Settings):
    """A whole run, at depth `head` (with a core hypernetwork) or `full` (with a memory).

    `workers` 0 trains in this process, N >= 1 in N Ray Train workers, [M, N] in as many from M to N
    as the cluster has room for (elastic). Each reserves a GPU where the cluster has any, and
    `worker_cpus` CPUs, of which torch uses the whole ones. A run survives `max_failures` workers
    that die; it goes on from the last checkpoint.
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
