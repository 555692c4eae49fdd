"""From features to a trained bundle: clusters, static stage, hypernetwork stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import CoreHypernetwork
from adapter_gen.storage import EmbeddingInfo
from adapter_gen.update import SharedBases
from cluster_router.embedding import TokenEmbedder
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import FloatArray
from training.base import FrozenBase
from training.batches import EpisodeBatches, StaticBatches, gather
from training.clusters import (
    Conditions,
    assign,
    embed_contexts,
    fit_snapshot,
    idf_weights,
    mutual_information,
)
from training.config import HyperSettings, StageSettings, TrainSettings
from training.curvature import Curvature
from training.episodes import draw_episodes
from training.features import Features
from training.least_squares import Groups, solve_shift
from training.modules import AdaptedHead, HeadBases
from training.objective import CandidateSampler
from training.optimise import Runtime, Stage, StageResult

_CURVATURE_ROWS = 16_384
"""Scored tokens that the second derivative of the loss is averaged over."""
_VALIDATION_POSITIONS = 24
"""Scored tokens a document in the losses that steer early stopping; figures use all of them."""


@dataclass(frozen=True, eq=False)
class Clustering:
    """The clusters of a run and what embeds prompts for them.

    Attributes:
        embedder: embeds token sequences.
        token_weights: float32 [vocabulary], None for a plain mean.
        train: float32 [N, d], embeddings of the training contexts.
        snapshot: the clusters fitted on them.
    """

    embedder: TokenEmbedder
    token_weights: FloatArray | None
    train: FloatArray
    snapshot: ClusterSnapshot

    @classmethod
    def fit(cls, base: FrozenBase, train: Features, settings: TrainSettings) -> Clustering:
        """Fit on the contexts of `train`; see `fit_snapshot` for errors."""
        weighted = settings.clusters.token_weights == "idf"
        weights = idf_weights(train.windows, base.embedding) if weighted else None
        embedder = TokenEmbedder(base.embedding, weights)
        embeddings = embed_contexts(train.windows, embedder)
        snapshot = fit_snapshot(embeddings, settings.clusters, settings.seed)
        return cls(embedder, weights, embeddings, snapshot)

    def conditions(self, features: Features) -> Conditions:
        """What serving would condition each window on, from its own context."""
        rows = assign(embed_contexts(features.windows, self.embedder), self.snapshot)
        return Conditions.of(rows, self.snapshot)

    def agreement(self, features: Features) -> float:
        """Normalised mutual information of clusters and domains."""
        rows = assign(embed_contexts(features.windows, self.embedder), self.snapshot)
        return mutual_information(rows, [window.domain for window in features.windows])


@dataclass(frozen=True, eq=False)
class Trained:
    """The outcome of a run: the bundle, the static baseline, and how training went."""

    bundle: Bundle
    static: SharedBases
    record: dict[str, Any]


@dataclass(frozen=True)
class StartResult:
    """The closed-form start: the scale taken, and the validation loss at each scale tried."""

    scale: float
    losses: dict[float, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values; the losses as pairs (scale, nats per token)."""
        return {"scale": self.scale, "losses": [list(pair) for pair in self.losses.items()]}


def train(
    base: FrozenBase,
    train_set: Features,
    validation: Features,
    settings: TrainSettings,
    runtime: Runtime,
    created_by: str = "",
) -> Trained:
    """Train a `head`-depth bundle.

    Stage 1 fits the static update, which every cluster shares and which is the baseline of the
    figures. Stage 2 fits the hypernetwork on top; the bases move along slowly or not at all.

    Raises:
        ConfigError: settings that do not fit the data.
        SetupError: the loss became NaN or infinite.
    """
    torch.manual_seed(settings.seed)
    clustering = Clustering.fit(base, train_set, settings)
    bases = HeadBases(init_bases(base.head_spec(settings.rank), settings.seed))
    first = _static_stage(base, bases, train_set, validation, settings, runtime)
    static = bases.frozen()
    hypernetwork = _hypernetwork(base, clustering, settings)
    start, second = _hyper_stage(
        base, bases, hypernetwork, clustering, train_set, validation, settings, runtime
    )
    bundle = Bundle(
        base_model=settings.model,
        fingerprint=base.fingerprint,
        hypernetwork=hypernetwork,
        bases=bases.frozen(),
        snapshot=clustering.snapshot,
        token_weights=clustering.token_weights,
        embedding=EmbeddingInfo(dim=clustering.embedder.dim, tokens=settings.data.context_tokens),
        created_by=created_by,
        seed=settings.seed,
    )
    record = {
        "train_documents": len(train_set),
        "train_tokens": train_set.tokens,
        "validation_documents": len(validation),
        "cluster_domain_nmi": clustering.agreement(validation),
        "static": first.as_json(),
        "start": start.as_json(),
        "hyper": second.as_json(),
    }
    return Trained(bundle, static, record)


def _hypernetwork(
    base: FrozenBase, clustering: Clustering, settings: TrainSettings
) -> CoreHypernetwork:
    spec = base.head_spec(settings.rank)
    hypernetwork = settings.hypernetwork.build(spec, clustering.train.shape[1])
    hypernetwork.fit_normalisation(torch.from_numpy(clustering.train))
    return hypernetwork


def _static_stage(
    base: FrozenBase,
    bases: HeadBases,
    train_set: Features,
    validation: Features,
    settings: TrainSettings,
    runtime: Runtime,
) -> StageResult:
    stage = settings.static
    module = AdaptedHead(bases, None, base.head)
    seed = _worker_seed(settings.seed, runtime.rank)
    batches = StaticBatches(train_set, stage.documents, stage.positions, seed)
    sampler = _sampler(stage, train_set, len(base.head), seed)
    optimiser = Stage("static", stage, module, [(bases, 1.0)], sampler=sampler)
    return optimiser.run(batches, _validator(module, validation, None), runtime)


def _hyper_stage(
    base: FrozenBase,
    bases: HeadBases,
    hypernetwork: CoreHypernetwork,
    clustering: Clustering,
    train_set: Features,
    validation: Features,
    settings: TrainSettings,
    runtime: Runtime,
) -> tuple[StartResult, StageResult]:
    stage = settings.hyper
    module = AdaptedHead(bases, hypernetwork, base.head)
    validate = _validator(module, validation, clustering.conditions(validation))
    episodes = draw_episodes(clustering.train, stage, settings.seed)
    # The start is the same in every worker, so it draws its candidates by the run's seed.
    sampler = _sampler(stage, train_set, len(base.head), settings.seed)
    curvature = Curvature.measure(module, train_set, sampler, _CURVATURE_ROWS)
    groups = Groups.of(episodes, clustering.train, curvature)
    start = _start(hypernetwork, groups, curvature, stage, validate)
    seed = _worker_seed(settings.seed + 1, runtime.rank)
    batches = EpisodeBatches(train_set, clustering.train, episodes, stage, seed)
    sampler = _sampler(stage, train_set, len(base.head), seed)
    parts = [(hypernetwork, 1.0), (bases, stage.bases_rate)]
    optimiser = Stage("hypernetwork", stage, module, parts, stage.core_penalty, sampler)
    return start, optimiser.run(batches, validate, runtime)


def _start(
    hypernetwork: CoreHypernetwork,
    groups: Groups,
    curvature: Curvature,
    stage: HyperSettings,
    validate: Callable[[], float],
) -> StartResult:
    """Fit the shift in closed form and keep it at the scale that validates best."""
    inverse = curvature.inverse(stage.damping)
    solved = solve_shift(hypernetwork, groups, inverse, stage.ridge)
    weight = hypernetwork.shift.weight.data
    losses = {}
    for scale in (0.0, *stage.scales):
        weight.copy_(scale * solved)
        losses[scale] = validate()
    best = min(losses, key=lambda scale: losses[scale])
    weight.copy_(best * solved)
    return StartResult(best, losses)


def _sampler(
    stage: StageSettings, train_set: Features, vocabulary: int, seed: int
) -> CandidateSampler | None:
    if stage.candidates is None:
        return None
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for index in range(len(train_set)):
        counts += torch.bincount(train_set.targets(index), minlength=vocabulary)
    return CandidateSampler(counts, *stage.candidates, seed)


def _validator(
    module: AdaptedHead, validation: Features, conditions: Conditions | None
) -> Callable[[], float]:
    """Mean loss on a fixed sample of validation tokens, each conditioned as serving would."""
    batch = gather(
        validation,
        range(len(validation)),
        _VALIDATION_POSITIONS,
        np.random.default_rng(0),
        conditions,
    )

    @torch.no_grad()
    def validate() -> float:
        losses, _ = module(batch)
        return float(losses.mean())

    return validate


def _worker_seed(seed: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
