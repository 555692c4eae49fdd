"""Settings of an evaluation. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapter_gen.refine import RefineConfig
from adapter_gen.refinery import CommonConfig, RefineryConfig
from cluster_router.learning.config import LearnerConfig
from cluster_router.wire.errors import ConfigError
from training.statistics import RESAMPLES

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
GroupName = Literal["seen", "unseen", "wikitext"]

SNAPSHOT_VARIANTS = {
    "base": "the unadapted model",
    "static": "a static update trained alone on the same tokens: the baseline of every gain",
    "budget_static": "a static update with the hypernetwork's whole trainable budget",
    "hyper": "this bundle; each document's own context chooses its cluster",
    "nearest": "the same, with the nearest cluster however unlike it is",
    "shuffled": "this bundle with a random other cluster",
    "mean": "the mean of all clusters' updates",
    "noise": "a random update of the same norm as the cluster's",
    "own": "the hypernetwork conditioned on the document's own context alone",
    "merge": "the nearest clusters' updates, weighted by similarity",
}
STREAM_VARIANTS = {
    "stream": "the hypernetwork on clusters formed online from earlier contexts",
    "refined_common": "the same, and what all earlier contexts have in common",
    "refined": "the same, refined further on the cluster's earlier contexts",
    "refined_shuffled": "the refined update of a random other cluster",
    "refined_mean": "the mean of all clusters' refined updates",
    "refined_noise": "a random update of the same norm as the refined one",
    "refined_random": "refined on a random partition of equal sizes",
    "refined_merge": "the nearest clusters' refined updates, weighted by similarity",
    "refined_own": "refined on the document's own context alone",
    "in_context": "earlier contexts of the cluster in the prompt, static update",
    "unigram_cache": "unigram cache over the cluster's earlier contexts, on top of static",
    "neural_cache": "neural cache over the cluster's latest contexts, on top of static",
    "oracle": "a LoRA fine-tuned on earlier contexts of the document's true domain",
}
VARIANTS = SNAPSHOT_VARIANTS | STREAM_VARIANTS
EXPENSIVE = ("refined_own", "in_context", "neural_cache", "oracle")
"""Measured on a part of the documents only, as many of each domain."""
QUICK = (
    "base", "static", "budget_static", "hyper", "shuffled", "mean",
    "stream", "refined_common", "refined", "refined_shuffled",
)  # fmt: skip


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OracleSettings(_Settings):
    """How the oracle is fine-tuned: Adam on U, V, S0 and the shift of the static update.

    Attributes:
        steps: most steps.
        learning_rate: of Adam.
        batch: contexts in one step.
        held_back: share of the contexts on which the best step is chosen.
        evaluate_every: steps between two looks at their loss.
        patience: looks without a better one after which it ends.
    """

    steps: Positive = 60
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3
    batch: Positive = 8
    held_back: Annotated[float, Field(gt=0, lt=1)] = 0.2
    evaluate_every: Positive = 10
    patience: Positive = 2


class StreamSettings(_Settings):
    """How documents arrive and what is learned from those that arrived earlier.

    Attributes:
        groups: groups of documents that arrive as a stream, each by itself.
        warmup_documents: contexts of this many further documents of each domain arrive too; they
            are never scored. They come from splits that give no scored document, as far as those
            go.
        warmup: whether they arrive before all others, or in between.
        start: whether clusters begin with the bundle's or with none.
        publish_every: arrivals between two publications of the clusters.
        common: what all arrivals have in common, and when it is learned anew.
        refine_every: new contexts of a cluster after which it is refined anew; as many as it had
            learned from, if that is more.
        buffer: contexts that refinement learns from: the cluster's latest.
        support_sizes: the gain is also measured with at most so many earlier contexts.
        learner: settings of the online clustering.
    """

    groups: tuple[GroupName, ...] = ("unseen",)
    warmup_documents: Count = 48
    warmup: Literal["first", "mixed"] = "first"
    start: Literal["bundle", "empty"] = "bundle"
    publish_every: Positive = 16
    common: CommonConfig = CommonConfig()
    refine_every: Positive = 16
    buffer: Positive = 64
    support_sizes: tuple[Count, ...] = (0, 16, 32, 64, 128)
    learner: LearnerConfig = LearnerConfig()


class EvaluateSettings(_Settings):
    """A whole evaluation.

    Attributes:
        documents: scored documents of each domain.
        expensive_documents: of these, how many the expensive variants are measured on.
        variants: which to measure; None measures all that there is what they need for.
        batch: windows in one forward pass. With more than one, the last bits of a loss may depend
            on what else is in the pass.
        seed: of arrival order, controls and bootstrap.
        resamples: of the bootstrap.
        merge_nearest: clusters that are merged.
        merge_temperature: of the softmax over their similarities.
        context_prompt_tokens: most tokens of earlier contexts that `in_context` puts in the prompt
            and that the neural cache looks back on.
        refine: how clusters are refined on the stream.
        oracle: how the oracle is fine-tuned.
        stream: how documents of unseen domains arrive.
    """

    documents: Annotated[int, Field(ge=2)] = 16
    expensive_documents: Positive = 4
    variants: tuple[str, ...] | None = None
    batch: Positive = 8
    seed: Count = 0
    resamples: Positive = RESAMPLES
    merge_nearest: Positive = 4
    merge_temperature: Annotated[float, Field(gt=0)] = 0.05
    context_prompt_tokens: Positive = 1500
    refine: RefineConfig = RefineryConfig().refine
    oracle: OracleSettings = OracleSettings()
    stream: StreamSettings = StreamSettings()

    def quick(self) -> EvaluateSettings:
        """A few minutes' worth: few documents, the cheap variants."""
        stream = self.stream.model_copy(
            update={"warmup_documents": 12, "refine_every": 8, "support_sizes": ()}
        )
        return self.model_copy(update={"documents": 4, "variants": QUICK, "stream": stream})

    def chosen(self) -> tuple[str, ...]:
        """Names of the variants to measure, static always among them.

        Raises:
            ConfigError: a name is unknown.
        """
        if self.variants is None:
            return tuple(VARIANTS)
        for name in self.variants:
            if name not in VARIANTS:
                raise ConfigError(
                    f"there is no variant {name!r}; there are {', '.join(VARIANTS)}", "variants"
                )
        return tuple(name for name in VARIANTS if name == "static" or name in self.variants)


def load_evaluate_settings(path: Path | None, **overrides: Any) -> EvaluateSettings:
    """Read a YAML file, if any; `overrides` that are not None replace its settings.

    Raises:
        ConfigError: no such file, not YAML, an unknown key or a value out of range.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the settings {path}: {error}", "settings") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"the settings {path} must be a mapping", "settings")
    return checked_settings(raw | {name: v for name, v in overrides.items() if v is not None})


def checked_settings(raw: dict[str, Any]) -> EvaluateSettings:
    """Settings from plain values.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    try:
        return EvaluateSettings.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"evaluation settings: {where}: {first['msg']}", where) from error
