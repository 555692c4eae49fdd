"""Runs a whole evaluation: every variant on every group of documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from adapter_gen.bundle import Bundle
from adapter_gen.update import SharedBases, UpdateSpec
from cluster_router.embedding import TokenEmbedder
from training.base import FrozenBase
from training.clusters import NO_CLUSTER, embed_contexts
from training.data import Window
from training.evaluation.caches import KINDS, CacheCase, Cached
from training.evaluation.groups import Group
from training.evaluation.oracle import OracleTuner, domain_contexts
from training.evaluation.refinery import Refinery
from training.evaluation.scores import Scores, Work
from training.evaluation.settings import EXPENSIVE, EvaluateSettings
from training.evaluation.store import Store
from training.evaluation.stream import (
    NOBODY,
    Arrivals,
    Common,
    Plan,
    Refinement,
    plan_stream,
    random_labels,
)
from training.evaluation.stream_variants import (
    Prompter,
    StreamSetting,
    StreamUpdates,
    last_of_each_domain,
    stream_variants,
)
from training.evaluation.updates import Family, Update
from training.evaluation.variants import (
    Baselines,
    SnapshotUpdates,
    Variant,
    snapshot_variants,
)
from training.statistics import Array

_TUNING_DOCUMENTS = 2
"""Warm-up documents of each domain that the caches are tuned on."""
_OF_CLUSTERS = {"refined", "refined_shuffled", "refined_mean", "refined_noise", "refined_merge"}
"""Variants that need the refinements of the stream's clusters."""


@dataclass(frozen=True)
class Facts:
    """What is known of one document beside its losses.

    Attributes:
        similarity: to the nearest of the bundle's clusters.
        assigned: whether that is near enough.
        cluster: id of the cluster it is assigned to, the stream's where there is one; -1 for none.
        support: earlier contexts of that cluster in the stream, None where there is no stream.
        predicted: what its refinements gained on contexts they held back, nats per token.
    """

    similarity: float
    assigned: bool
    cluster: int
    support: int | None = None
    predicted: float | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """One group under every variant.

    Attributes:
        name: of the group.
        windows: its documents.
        sums: summed loss [N] in nats by variant, NaN where it was not measured.
        facts: of each document.
    """

    name: str
    windows: Sequence[Window]
    sums: dict[str, Array]
    facts: Sequence[Facts]


@dataclass(eq=False)
class _Prepared:
    group: Group
    variants: list[Variant]
    snapshot: SnapshotUpdates
    stream: StreamUpdates | None = None
    plans: list[Plan] = field(default_factory=list)
    training: int = 0


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured, and what it is measured against.

    Attributes:
        bundle: the subject; its bases alone are the static update.
        budget: a static update with the hypernetwork's whole trainable budget.
    """

    bundle: Bundle
    budget: SharedBases | None = None


class Evaluator:
    """Measures one bundle.

    Args:
        base: the base model.
        subject: what is measured.
        settings: of the evaluation.
        store: what was computed before.
    """

    def __init__(
        self, base: FrozenBase, subject: Subject, settings: EvaluateSettings, store: Store
    ) -> None:
        self._base = base
        self._subject = subject
        self._settings = settings
        self._names = settings.chosen()
        self._work = Work()
        self._scores = Scores(base, store, settings.batch, self._work)
        bundle = subject.bundle
        self._refinery = Refinery(
            bundle, settings.refine, settings.stream.common.refine, self._scores, settings.seed
        )
        self._embedder = TokenEmbedder(base.embedding, bundle.token_weights)
        self._baselines = Baselines(
            unadapted=Family.unadapted(bundle.spec),
            static=self._refinery.family,
            budget=None if subject.budget is None else _family(bundle.spec, subject.budget),
        )

    def measure(self, groups: Sequence[Group]) -> list[Measured]:
        """Score every group under every variant.

        Raises:
            SetupError: a loss is NaN or infinite, or scores cannot be kept.
            DeltaError: a refinement met such a loss.
        """
        prepared = [self._prepare(group) for group in groups]
        self._work.plan(sum(v.tokens for one in prepared for v in one.variants))
        self._work.plan(sum(one.training for one in prepared))
        try:
            return [self._measure(one) for one in prepared]
        finally:
            self._work.close()

    def _prepare(self, group: Group) -> _Prepared:
        embeddings = embed_contexts(group.windows, self._embedder)
        updates = SnapshotUpdates(self._refinery, group.windows, embeddings, self._settings)
        found = snapshot_variants(self._names, updates, self._baselines, group.windows)
        prepared = _Prepared(group, list(found), updates)
        if group.name in self._settings.stream.groups:
            self._add_stream(prepared)
        return prepared

    def _add_stream(self, prepared: _Prepared) -> None:
        settings, windows = self._settings, prepared.group.windows
        stream, snapshot = settings.stream, self._subject.bundle.snapshot
        arrivals = Arrivals.of(prepared.group, self._embedder, stream, settings.seed)
        plan = plan_stream(arrivals, snapshot, stream)
        prepared.plans = [plan]
        prepared.stream = StreamUpdates(self._refinery, plan, windows, settings)
        random = None
        if "refined_random" in self._names:
            labels = random_labels(plan, settings.seed)
            prepared.plans.append(plan_stream(arrivals, snapshot, stream, labels))
            random = StreamUpdates(self._refinery, prepared.plans[1], windows, settings)
        expensive = last_of_each_domain(plan, windows, settings.expensive_documents)
        costly = [window for window, chosen in zip(windows, expensive, strict=True) if chosen]
        prepared.training = self._training(prepared.plans, costly)
        prompter = Prompter.of(self._base, windows, settings)
        setting = StreamSetting(
            updates=prepared.stream,
            random=random,
            static=self._baselines.static,
            prompter=prompter,
            expensive=expensive,
            oracle=self._oracle(plan, windows, expensive),
        )
        prepared.variants += stream_variants(self._names, setting, windows, settings)
        prepared.variants += self._caches(plan, windows, expensive, prompter)

    def _oracle(
        self, plan: Plan, windows: Sequence[Window], expensive: Sequence[bool]
    ) -> _DomainOracle:
        settings = self._settings
        tuner = OracleTuner(self._baselines.static, settings.oracle, self._scores, settings.seed)
        contexts = domain_contexts(plan, windows, expensive, settings.stream.buffer)
        if "oracle" in self._names:
            self._work.plan(sum(tuner.cost(found) for found in contexts.values()))
        return _DomainOracle(
            {name: tuner.tuned(found) for name, found in contexts.items()}, windows
        )

    def _caches(
        self,
        plan: Plan,
        windows: Sequence[Window],
        expensive: Sequence[bool],
        prompter: Prompter,
    ) -> list[Cached]:
        tuning = _tuning(plan)
        times = [moment.time for moment in plan.of_windows(len(windows))]
        variants = []
        for kind in KINDS:
            name = f"{kind}_cache"
            if name not in self._names:
                continue
            support = prompter.latest if name in EXPENSIVE else Plan.support_of
            measured = expensive if name in EXPENSIVE else [True] * len(windows)
            cases = [
                CacheCase(window, support(plan, plan.moments[time])) if chosen else None
                for window, time, chosen in zip(windows, times, measured, strict=True)
            ]
            tuned = [
                CacheCase(plan.arrivals.windows[time], support(plan, plan.moments[time]))
                for time in tuning
            ]
            variants.append(Cached(name, kind, cases, tuned, self._baselines.static))
        return variants

    def _training(self, plans: Sequence[Plan], expensive: Sequence[Window]) -> int:
        """Tokens through the model, about, that refinements for the chosen variants take."""
        names = set(self._names)
        tokens = 0
        if "refined_own" in names:
            tokens += sum(self._refinery.cost_of_own(window) for window in expensive)
        wanted = [bool(names & _OF_CLUSTERS), "refined_random" in names]
        for plan, of_clusters in zip(plans, wanted, strict=False):
            found = _refinements(plan)
            if not of_clusters:
                found = [one for one in found if isinstance(one, Common)]
            if of_clusters or "refined_common" in names:
                tokens += self._refinery.cost(plan, found)
        return tokens

    def _measure(self, prepared: _Prepared) -> Measured:
        sums = {variant.name: variant.nats(self._scores) for variant in prepared.variants}
        facts = [self._facts(prepared, index) for index in range(len(prepared.group.windows))]
        return Measured(prepared.group.name, prepared.group.windows, sums, facts)

    def _facts(self, prepared: _Prepared, index: int) -> Facts:
        similarity = round(float(prepared.snapshot.similarities[index]), 6)
        row, stream = int(prepared.snapshot.rows[index]), prepared.stream
        assigned = row != NO_CLUSTER
        if stream is None:
            ids = self._subject.bundle.snapshot.ids
            return Facts(similarity, assigned, int(ids[row]) if assigned else NOBODY)
        moment = stream.moments[index]
        predicted = None
        if moment.refinement is not None and "refined" in self._names:
            predicted = round(self._refinery.gain(stream.plan, moment.refinement), 6)
        return Facts(similarity, assigned, moment.cluster, len(moment.support), predicted)


@dataclass(frozen=True, eq=False)
class _DomainOracle:
    updates: dict[str, Update]
    windows: Sequence[Window]

    def __call__(self, index: int) -> Update:
        return self.updates[self.windows[index].domain]


def _family(spec: UpdateSpec, bases: SharedBases) -> Family:
    """Bases may be of another rank than the bundle's."""
    rank = bases.s0.shape[-1]
    return Family.of(UpdateSpec(spec.depth, rank, spec.hidden_size, spec.sites, spec.alpha), bases)


def _refinements(plan: Plan) -> list[Refinement | Common]:
    """All that documents are scored under, or that such starts from."""
    found: dict[Refinement | Common, None] = {}
    for moment in plan.moments:
        if plan.arrivals.scored[moment.time] < 0:
            continue
        newest = list(moment.known.refinements.values())
        found |= dict.fromkeys(newest)
        for common in (moment.known.common, *(one.common for one in newest)):
            one = common
            while one is not None:
                found[one] = None
                one = one.before
    return list(found)


def _tuning(plan: Plan) -> list[int]:
    """The last warm-up arrivals of each domain."""
    by_domain: dict[str, list[int]] = {}
    for time in np.flatnonzero(plan.arrivals.scored < 0).tolist():
        by_domain.setdefault(plan.arrivals.windows[time].domain, []).append(time)
    return [time for times in by_domain.values() for time in times[-_TUNING_DOCUMENTS:]]
