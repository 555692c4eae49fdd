"""From features to a trained bundle: clusters, static stage, hypernetwork stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import CoreConfig, CoreHypernetwork
from adapter_gen.storage import EmbeddingInfo
from training.base import FrozenBase
from training.batches import EpisodeBatches, StaticBatches, gather
from training.checkpoints import Saved
from training.clustering import Clustering
from training.clusters import Conditions
from training.config import StageSettings, TrainSettings
from training.curvature import Curvature
from training.episodes import Episode, draw_episodes
from training.features import Features
from training.least_squares import Groups, StartResult, fit_start
from training.modules import AdaptedHead, Batch, HeadBases
from training.objective import CandidateSampler
from training.optimise import Stage, StageResult, load_state, trained_state
from training.runtime import Runtime
from training.shares import Seed, to_device

_CURVATURE_ROWS = 16_384
"""Scored tokens that the second derivative of the loss is averaged over."""
_VALIDATION_POSITIONS = 24
"""Scored tokens a document in the losses that steer early stopping; figures use all of them."""


@dataclass(frozen=True, eq=False)
class Trained:
    """The outcome of a run: the bundle, and how training went."""

    bundle: Bundle
    record: dict[str, Any]


class HeadTraining:
    """Trains a `head`-depth bundle.

    Stage 1 fits the static update, which every cluster shares and which is the baseline of the
    figures. Stage 2 fits the hypernetwork on top: its shift in closed form, then all of it by
    gradient descent for as long as that helps; the bases stay.

    Args:
        base: the frozen model.
        train: features to train on.
        validation: features that steer early stopping and the scale of the closed-form fit.
        settings: of the run.
        runtime: this process, or one worker of several.
    """

    def __init__(
        self,
        base: FrozenBase,
        train: Features,
        validation: Features,
        settings: TrainSettings,
        runtime: Runtime,
    ) -> None:
        self._base = base
        self._train = train
        self._validation = validation
        self._settings = settings
        self._runtime = runtime

    def run(self, created_by: str) -> Trained:
        """Train and assemble the bundle.

        Raises:
            ConfigError: settings that do not fit the data.
            SetupError: the loss became NaN or infinite.
        """
        settings = self._settings
        torch.manual_seed(settings.seed)
        clustering = Clustering.fit(self._base, self._train.windows, settings)
        spec = self._base.spec("head", settings.rank)
        bases = HeadBases(init_bases(spec, settings.seed))
        first = self._static_stage(bases)
        assert isinstance(settings.hypernetwork, CoreConfig)
        hypernetwork = settings.hypernetwork.build(spec, clustering.train.shape[1])
        hypernetwork.fit_normalisation(torch.from_numpy(clustering.train))
        start, second = self._hyper_stage(bases, hypernetwork, clustering)
        bundle = Bundle(
            base_model=settings.model,
            fingerprint=self._base.fingerprint,
            hypernetwork=hypernetwork,
            bases=bases.frozen(),
            snapshot=clustering.snapshot,
            token_weights=clustering.token_weights,
            embedding=EmbeddingInfo(
                dim=clustering.embedder.dim, tokens=settings.data.context_tokens
            ),
            created_by=created_by,
            seed=settings.seed,
        )
        record = {
            "train_documents": len(self._train),
            "train_tokens": self._train.tokens,
            "validation_documents": len(self._validation),
            "cluster_domain_nmi": clustering.agreement(self._validation.windows),
            "static": first.as_json(),
            "start": start.as_json(),
            "hyper": second.as_json(),
        }
        return Trained(bundle, record)

    def _static_stage(self, bases: HeadBases) -> StageResult:
        stage = self._settings.static
        module = AdaptedHead(bases, None, self._base.head)
        seed = Seed(self._settings.seed, "static")
        batches = StaticBatches(
            self._train, stage.documents, stage.positions, seed, self._sampler(stage)
        )
        optimiser = Stage[Batch]("static", stage, module, [(bases, 1.0)])
        return optimiser.run(batches, self._validator(module, None), self._runtime)

    def _hyper_stage(
        self, bases: HeadBases, hypernetwork: CoreHypernetwork, clustering: Clustering
    ) -> tuple[StartResult, StageResult]:
        stage, seed = self._settings.hyper, self._settings.seed
        module = AdaptedHead(bases, hypernetwork, self._base.head)
        validate = self._validator(module, clustering.conditions(self._validation.windows))
        episodes = draw_episodes(clustering.train, stage, seed)
        sampler = self._sampler(stage)
        start = self._start(module, hypernetwork, clustering, episodes, sampler, validate)
        batches = EpisodeBatches(
            self._train, clustering.train, episodes, stage, Seed(seed, "hypernetwork"), sampler
        )
        parts = [(hypernetwork, 1.0)]
        optimiser = Stage[Batch]("hypernetwork", stage, module, parts, stage.core_penalty)
        return start, optimiser.run(batches, validate, self._runtime)

    def _start(
        self,
        module: AdaptedHead,
        hypernetwork: CoreHypernetwork,
        clustering: Clustering,
        episodes: Sequence[Episode],
        sampler: CandidateSampler | None,
        validate: Callable[[], float],
    ) -> StartResult:
        """The closed form; the same in every worker, and kept like a stage."""
        saved = self._runtime.load("start")
        if saved is not None:
            load_state(hypernetwork, saved.tensors)
            return StartResult.from_json(saved.record)
        curvature = Curvature.measure(module, self._train, sampler, _CURVATURE_ROWS)
        groups = Groups.of(episodes, clustering.train, curvature)
        start = fit_start(hypernetwork, groups, curvature, self._settings.hyper, validate)
        saved = Saved(trained_state(hypernetwork), start.as_json(), finished=True)
        self._runtime.save("start", saved, {"validation": start.losses[start.scale]})
        return start

    def _sampler(self, stage: StageSettings) -> CandidateSampler | None:
        if stage.candidates is None:
            return None
        vocabulary = len(self._base.head)
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        for index in range(len(self._train)):
            counts += torch.bincount(self._train.targets(index), minlength=vocabulary)
        return CandidateSampler(counts, *stage.candidates)

    def _validator(self, module: AdaptedHead, conditions: Conditions | None) -> Callable[[], float]:
        """Mean loss on a fixed sample of validation tokens, each conditioned as serving would."""
        random = np.random.default_rng(0)
        indices = range(len(self._validation))
        batch = gather(self._validation, indices, _VALIDATION_POSITIONS, random, conditions)

        @torch.no_grad()
        def validate() -> float:
            losses, _ = module(to_device(batch, module.weight.device))
            return float(losses.mean())

        return validate
