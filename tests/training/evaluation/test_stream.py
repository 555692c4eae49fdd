"""Nothing of a later document, and no scored token, reaches what a document is scored under."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import Generated
from adapter_gen.refine import RefineConfig
from cluster_router.embedding import TokenEmbedder
from cluster_router.wire.types import Conditioning
from training.base import FrozenBase
from training.data import Window
from training.evaluation.evaluator import Measured
from training.evaluation.groups import Group
from training.evaluation.refinery import Refinery
from training.evaluation.scores import Scores, Work
from training.evaluation.settings import EvaluateSettings
from training.evaluation.store import Store
from training.evaluation.stream import NOBODY, Arrivals, Plan, plan_stream, random_labels
from training.evaluation.stream_variants import Prompter, StreamUpdates
from training.evaluation.updates import Update, digest
from training.statistics import Array

OF_THE_STREAM = (
    "static", "hyper", "stream", "refined_common", "refined", "refined_shuffled", "refined_mean",
    "refined_merge", "refined_own", "in_context", "unigram_cache", "neural_cache", "refined@4",
)  # fmt: skip


@pytest.fixture(scope="module")
def unseen(groups: list[Group]) -> Group:
    return next(group for group in groups if group.name == "unseen")


@pytest.fixture(scope="module")
def plan(
    base: FrozenBase, random_bundle: Bundle, unseen: Group, quick_settings: EvaluateSettings
) -> Plan:
    embedder = TokenEmbedder(base.embedding)
    arrivals = Arrivals.of(unseen, embedder, quick_settings.stream, quick_settings.seed)
    return plan_stream(arrivals, random_bundle.snapshot, quick_settings.stream)


def changed(group: Group, index: int, places: slice) -> Group:
    """The group with some tokens of one document replaced by others."""

    def replace(window: Window) -> Window:
        tokens = window.tokens.copy()
        tokens[places] = np.arange(len(tokens[places])) % 7 + 40
        return dataclasses.replace(window, tokens=tokens)

    windows = [replace(w) if i == index else w for i, w in enumerate(group.windows)]
    return dataclasses.replace(group, windows=windows)


@pytest.fixture(scope="module")
def cheap(quick_settings: EvaluateSettings) -> EvaluateSettings:
    return quick_settings.model_copy(
        update={"variants": tuple(name for name in OF_THE_STREAM if "@" not in name)}
    )


@pytest.fixture(scope="module")
def clean(
    measure: Callable[..., dict[str, Measured]],
    unseen: Group,
    cheap: EvaluateSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Array]:
    return measure([unseen], cheap, tmp_path_factory.mktemp("clean"))["unseen"].sums


def test_refinements_learn_from_earlier_contexts_only(plan: Plan) -> None:
    met = 0
    for moment in plan.moments:
        for cluster, members in moment.known.members.items():
            assert max(members) < moment.time
            assert list(members) == sorted(members)
            assert cluster != NOBODY
        refinement = moment.refinement
        while refinement is not None:
            assert max(refinement.prompts) < moment.time
            before = refinement.before
            if before is not None:
                moved = refinement.common is not before.common
                assert (
                    before.seen <= refinement.seen if moved else 2 * before.seen <= refinement.seen
                )
            refinement = before
            met += 1
    assert met, "some document should be served under a refinement"


def test_what_is_common_learns_from_earlier_contexts_only(
    plan: Plan, quick_settings: EvaluateSettings
) -> None:
    config, met = quick_settings.stream.common, 0
    for moment in plan.moments:
        common = moment.known.common
        while common is not None:
            assert max(common.prompts) < common.seen <= moment.time
            assert len(common.prompts) == min(common.seen, config.buffer)
            before = common.before
            assert before is None or common.seen - before.seen >= min(before.seen, config.buffer)
            common = before
            met += 1
        for refinement in moment.known.refinements.values():
            assert refinement.common is moment.known.common, "no cluster stays behind"
    assert met


class Moving(Refinery):
    """Moves every core by 1 for what is common, by 100 for a cluster, and calls either a gain."""

    def refine(self, contexts: Sequence[np.ndarray], start: Update, config: RefineConfig) -> Update:
        assert contexts
        way = 1.0 if config is self._common_config else 100.0

        def make() -> Generated:
            first = start.generated()
            assert first.cores is not None
            return dataclasses.replace(first, cores=first.cores + way)

        return self.update(digest(start.key, way), make)

    def _gain(self, update: Update) -> float:
        return 1.0


def test_clusters_start_from_what_is_generated_and_what_is_common(
    base: FrozenBase,
    random_bundle: Bundle,
    unseen: Group,
    plan: Plan,
    quick_settings: EvaluateSettings,
    tmp_path: Path,
) -> None:
    scores, common = Scores(base, Store(tmp_path), 1, Work()), quick_settings.stream.common.refine
    refinery = Moving(random_bundle, quick_settings.refine, common, scores, 0)
    updates = StreamUpdates(refinery, plan, unseen.windows, quick_settings)

    def moved(update: Update, conditioning: Conditioning | None) -> float:
        cores, generated = update.generated().cores, refinery.generate(conditioning).generated()
        assert cores is not None and generated.cores is not None
        way = cores - generated.cores
        assert float(way.max() - way.min()) < 1e-4
        return round(float(way.mean()))

    chains = set()
    for index, moment in enumerate(updates.moments):
        own, chain = moment.refinement, 0
        one = moment.known.common
        while one is not None:
            one, chain = one.before, chain + 1
        if own is None:
            continue
        assert moved(updates.refined(index), own.conditioning) == 100 + chain
        assert moved(updates.common(index), moment.conditioning(moment.cluster)) == chain
        assert refinery.gain(plan, own) == 1 + chain
        chains.add(chain)
        updates.moments[index] = dataclasses.replace(moment, cluster=NOBODY)
        assert updates.common(index).key == refinery.static().key
    assert 2 in chains


def test_warm_up_traffic_is_not_scored_and_shares_no_document(unseen: Group, plan: Plan) -> None:
    assert (plan.arrivals.scored[: len(unseen.warmup)] == -1).all()
    assert sorted(plan.arrivals.scored[len(unseen.warmup) :]) == list(range(len(unseen.windows)))
    scored = {window.tokens.tobytes() for window in unseen.windows}
    assert not scored & {window.tokens.tobytes() for window in unseen.warmup}


def test_a_later_document_changes_nothing_before_it(
    measure: Callable[..., dict[str, Measured]],
    unseen: Group,
    plan: Plan,
    cheap: EvaluateSettings,
    clean: dict[str, Array],
    tmp_path: Path,
) -> None:
    times = [moment.time for moment in plan.of_windows(len(unseen.windows))]
    poisoned = int(np.argsort(times)[len(times) // 2])
    found = measure([changed(unseen, poisoned, slice(None))], cheap, tmp_path)["unseen"].sums
    before = [i for i, time in enumerate(times) if time < times[poisoned]]
    assert before
    for name in OF_THE_STREAM:
        assert np.array_equal(found[name][before], clean[name][before], equal_nan=True), name
    assert found["static"][poisoned] != clean["static"][poisoned]


def test_the_poison_does_reach_what_comes_after_it(
    base: FrozenBase, random_bundle: Bundle, unseen: Group, plan: Plan, cheap: EvaluateSettings
) -> None:
    """Else the test above would prove nothing."""
    first = int(np.argmin([moment.time for moment in plan.of_windows(len(unseen.windows))]))
    arrivals = Arrivals.of(
        changed(unseen, first, slice(None)),
        TokenEmbedder(base.embedding),
        cheap.stream,
        cheap.seed,
    )
    other = plan_stream(arrivals, random_bundle.snapshot, cheap.stream)
    last = (plan.moments[-1].known, other.moments[-1].known)
    assert not np.array_equal(last[0].snapshot.mean, last[1].snapshot.mean)


def test_scored_tokens_are_never_learned_from(
    measure: Callable[..., dict[str, Measured]],
    unseen: Group,
    plan: Plan,
    cheap: EvaluateSettings,
    clean: dict[str, Array],
    tmp_path: Path,
) -> None:
    times = [moment.time for moment in plan.of_windows(len(unseen.windows))]
    first = int(np.argmin(times))
    scored = slice(unseen.windows[first].context, None)
    found = measure([changed(unseen, first, scored)], cheap, tmp_path)["unseen"].sums
    others = [i for i in range(len(times)) if i != first]
    for name in OF_THE_STREAM:
        assert np.array_equal(found[name][others], clean[name][others], equal_nan=True), name
    assert found["refined"][first] != clean["refined"][first]


def test_a_random_partition_has_clusters_of_equal_sizes(
    plan: Plan, random_bundle: Bundle, cheap: EvaluateSettings
) -> None:
    labels = random_labels(plan, 0)
    own = [moment.cluster for moment in plan.moments]
    assert Counter(labels) == Counter(own)
    assert labels != own
    other = plan_stream(plan.arrivals, random_bundle.snapshot, cheap.stream, labels)
    assert [moment.cluster for moment in other.moments] == labels
    assert any(moment.refinement for moment in other.moments)


def test_less_support_means_an_earlier_refinement(plan: Plan) -> None:
    newest = max(
        (moment.refinement for moment in plan.moments if moment.refinement),
        key=lambda refinement: refinement.seen,
    )
    assert newest.within(newest.seen) is newest
    assert newest.within(newest.seen - 1) is newest.before
    assert newest.within(0) is None


def test_a_prompt_of_earlier_contexts_leaves_the_scored_tokens_alone(
    plan: Plan, unseen: Group
) -> None:
    prompter = Prompter(tokens=70, separator=(5,))
    moment = max(plan.of_windows(len(unseen.windows)), key=lambda moment: len(moment.support))
    window = plan.arrivals.windows[moment.time]
    longer = prompter.prompt(window, plan, moment)
    assert np.array_equal(longer.targets, window.targets)
    latest = plan.arrivals.windows[moment.support[-1]].context_tokens
    tail = np.concatenate([latest, [5], window.tokens])
    assert np.array_equal(longer.tokens[-len(tail) :], tail)
    assert 0 < len(longer.tokens) - len(window.tokens) <= 70


def test_a_stream_can_begin_with_no_cluster(
    base: FrozenBase, random_bundle: Bundle, unseen: Group, cheap: EvaluateSettings
) -> None:
    empty = cheap.stream.model_copy(update={"start": "empty"})
    arrivals = Arrivals.of(unseen, TokenEmbedder(base.embedding), empty, 0)
    found = plan_stream(arrivals, random_bundle.snapshot, empty)
    assert {moment.cluster for moment in found.moments} == {NOBODY}, "32 arrivals make the first"
    assert found.moments[0].similarity == -1
