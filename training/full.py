"""A run at depth `full`: the model itself is in the loop, under an update of every linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import Generated, MemoryConfig, MemoryHypernetwork
from adapter_gen.language_model import AdaptedLM, ScoredTokens
from adapter_gen.storage import EmbeddingInfo
from adapter_gen.update import SharedBases, UpdateSpec
from training.base import FrozenBase
from training.clustering import Clustering
from training.config import TrainSettings
from training.data import Window
from training.optimise import Stage, StageResult
from training.pipeline import Trained
from training.prototypes import Prototypes
from training.runtime import Runtime
from training.scoring import WindowScorer
from training.shares import Seed, Share, Split

_POOL = 16
"""Batches that share a pool, within which documents of like length go together."""


class FullBases(nn.Module):
    """The shared parts of a `full`-depth update as trainable parameters.

    S0 is the identity and stays: with U and V trained it adds nothing, and a generated core then
    measures itself against one. U starts at zero, so the update does.
    """

    s0: Tensor

    def __init__(self, spec: UpdateSpec, seed: int) -> None:
        super().__init__()
        bases = init_bases(spec, seed)
        self.u = nn.ParameterList([torch.zeros_like(u) for u in bases.u])
        self.v = nn.ParameterList(list(bases.v))
        self.shift = nn.Parameter(torch.zeros(spec.hidden_size))
        identity = torch.eye(spec.rank).expand(len(spec.sites), -1, -1)
        self.register_buffer("s0", identity.clone(), persistent=False)

    def shared(self) -> SharedBases:
        """The live parameters as bases: gradients flow through."""
        return SharedBases(u=tuple(self.u), v=tuple(self.v), s0=self.s0, shift=self.shift)

    def frozen(self) -> SharedBases:
        """A detached copy on the CPU."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", copy=True)

        return SharedBases(
            u=tuple(copy(u) for u in self.u),
            v=tuple(copy(v) for v in self.v),
            s0=copy(self.s0),
            shift=copy(self.shift),
        )


class StaticLM(nn.Module):
    """Loss of a batch of token sequences under the static update."""

    def __init__(self, bases: FullBases, lm: AdaptedLM) -> None:
        super().__init__()
        self.bases = bases
        self._lm = lm  # no module, so that the frozen model is no part of the state

    def forward(self, batch: ScoredTokens) -> tuple[Tensor, Tensor]:
        """Losses float32 [n] in nats, and no penalty."""
        losses = self._lm.losses(batch, self.bases.shared())
        return losses, losses.new_zeros(())


class WindowBatches:
    """Every window once an epoch, some of its tokens scored; windows of like length together.

    Args:
        windows: to draw from.
        documents: in a global batch.
        positions: scored tokens of each, at random places.
        seed: of everything drawn.
    """

    def __init__(
        self, windows: Sequence[Window], documents: int, positions: int, seed: Seed
    ) -> None:
        self._windows = windows
        self._documents = min(documents, len(windows))
        self._positions = positions
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._order)

    def draw(self, step: int, split: Split) -> list[Share[ScoredTokens]]:
        """See `Batches.draw`."""
        per_epoch = len(self._windows) // self._documents
        epoch, place = divmod(step - 1, per_epoch)
        indices = self._epoch(epoch)[place]
        random = self._seed.generator(step)
        places = [self._places(self._windows[i], random) for i in indices]
        total = sum(len(part) for part in places)
        return [
            Share(
                batch=self._batch([indices[r] for r in rows], [places[r] for r in rows]),
                all_tokens=total,
                of_tokens=sum(len(places[r]) for r in rows) / total,
                of_documents=len(rows) / len(indices),
                seed=self._seed.number(step, rows.start),
            )
            for rows in split.rows(len(indices))
        ]

    def _order(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch."""
        random = self._seed.generator(-1 - epoch & 0x7FFFFFFF)
        order = random.permutation(len(self._windows))
        pool, batches = self._documents * _POOL, []
        for first in range(0, len(order), pool):
            part = sorted(order[first : first + pool], key=lambda i: len(self._windows[i].tokens))
            batches += [
                [int(i) for i in part[start : start + self._documents]]
                for start in range(0, len(part) - self._documents + 1, self._documents)
            ]
        return [batches[i] for i in random.permutation(len(batches))]

    def _places(self, window: Window, random: np.random.Generator) -> Tensor:
        first = max(1, window.lead)
        chosen = random.permutation(len(window.tokens) - first)[: self._positions] + first
        return torch.from_numpy(np.sort(chosen))

    def _batch(self, indices: Sequence[int], places: Sequence[Tensor]) -> ScoredTokens:
        sequences = [torch.from_numpy(self._windows[i].tokens.astype(np.int64)) for i in indices]
        tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        rows = [torch.full((len(part),), row) for row, part in enumerate(places)]
        return ScoredTokens(tokens, torch.cat(rows), torch.cat(list(places)))


class FullTraining:
    """Trains a `full`-depth bundle.

    Stage 1 fits the static update: U and V of every linear. Stage 2 refines its cores on the text
    of each cluster; the hypernetwork remembers them and blends those of similar clusters.

    Args:
        base: the frozen model, on the runtime's device.
        train: windows to train on; `dialogue` are the same with some in the chat format.
        dialogue: what stage 1 learns from.
        validation: windows that steer early stopping and how the memory blends.
        settings: of the run.
        runtime: this process, or one worker of several.
    """

    def __init__(
        self,
        base: FrozenBase,
        train: Sequence[Window],
        dialogue: Sequence[Window],
        validation: Sequence[Window],
        settings: TrainSettings,
        runtime: Runtime,
    ) -> None:
        self._base = base
        self._train = train
        self._dialogue = dialogue
        self._validation = validation
        self._settings = settings
        self._runtime = runtime
        self._spec = base.spec("full", settings.rank)

    def run(self, created_by: str) -> Trained:
        """Train and assemble the bundle.

        Raises:
            ConfigError: settings that do not fit the data.
            SetupError: the loss became NaN or infinite.
            DeltaError: a refinement met NaN or infinity.
        """
        settings = self._settings
        torch.manual_seed(settings.seed)
        clustering = Clustering.fit(self._base, self._train, settings)
        bases = FullBases(self._spec, settings.seed)
        first = self._static_stage(bases)
        static = bases.frozen()
        cores, refined = self._prototypes(static, clustering)
        hypernetwork = self._hypernetwork(clustering, cores)
        blends = self._fit_blend(hypernetwork, static, clustering)
        bundle = Bundle(
            base_model=settings.model,
            fingerprint=self._base.fingerprint,
            hypernetwork=hypernetwork,
            bases=static,
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
            "train_tokens": sum(len(window.tokens) for window in self._train),
            "validation_documents": len(self._validation),
            "cluster_domain_nmi": clustering.agreement(self._validation),
            "static": first.as_json(),
            "prototypes": refined,
            "blends": blends,
        }
        return Trained(bundle, record)

    def _static_stage(self, bases: FullBases) -> StageResult:
        stage = self._settings.static
        module = StaticLM(bases, AdaptedLM(self._base.model, self._spec))
        seed = Seed(self._settings.seed, "static")
        batches = WindowBatches(self._dialogue, stage.documents, stage.positions, seed)
        scorer = WindowScorer(self._base, self._spec)
        validate = self._validator(scorer, bases.frozen)
        return Stage[ScoredTokens]("static", stage, module, [(bases, 1.0)]).run(
            batches, validate, self._runtime
        )

    def _prototypes(
        self, static: SharedBases, clustering: Clustering
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        if self._settings.prototypes.strengths:
            prototypes = Prototypes(self._base, self._spec, static, self._settings, self._runtime)
            return prototypes.refine(self._train, clustering)
        rank = self._spec.rank
        return torch.zeros(len(clustering.snapshot), len(self._spec.sites), rank, rank), []

    def _validator(
        self, scorer: WindowScorer, bases: Callable[[], SharedBases]
    ) -> Callable[[], float]:
        tokens = sum(window.scored for window in self._validation)

        def validate() -> float:
            return float(scorer.score(self._validation, bases()).sum() / tokens)

        return validate

    def _hypernetwork(self, clustering: Clustering, cores: Tensor) -> MemoryHypernetwork:
        config = self._settings.hypernetwork
        assert isinstance(config, MemoryConfig)
        config = config.model_copy(update={"prototypes": len(cores)})
        vectors = torch.from_numpy(clustering.snapshot.conditioning)
        hypernetwork = config.build(self._spec, vectors.shape[1])
        hypernetwork.remember(vectors, cores, torch.from_numpy(clustering.train).mean(0))
        return hypernetwork

    @torch.no_grad()
    def _fit_blend(
        self, hypernetwork: MemoryHypernetwork, bases: SharedBases, clustering: Clustering
    ) -> list[dict[str, float]]:
        """Keep the sharpness and strength that validate best; returns the loss of each pair."""
        conditions = clustering.conditions(self._validation)
        scorer = WindowScorer(self._base, self._spec)
        tokens = sum(window.scored for window in self._validation)
        own, settings = float(hypernetwork.sharpness), self._settings.prototypes
        # At strength 0 nothing is blended.
        pairs = [(own, 0.0), *product((own, *settings.sharpness), settings.strengths)]
        tried = []
        for sharpness, strength in pairs:
            hypernetwork.blend(sharpness, strength)
            generated: Generated = hypernetwork(conditions.vectors, conditions.support)
            sums = scorer.score(self._validation, bases, generated)
            loss = float(sums.sum() / tokens)
            tried.append({"sharpness": sharpness, "strength": strength, "loss": loss})
        best = min(tried, key=lambda one: one["loss"])
        hypernetwork.blend(best["sharpness"], best["strength"])
        return tried
