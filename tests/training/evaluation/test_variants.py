"""What updates are made of: which clusters are merged, which tokens are put in front of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adapter_gen.bundle import Bundle
from adapter_gen.refine import RefineConfig
from cluster_router.wire.snapshot import ClusterSnapshot, unit
from training.base import FrozenBase
from training.data import Window
from training.evaluation.groups import Group
from training.evaluation.refinery import Refinery
from training.evaluation.scores import Scores, Work
from training.evaluation.settings import EvaluateSettings
from training.evaluation.store import Store
from training.evaluation.stream import Arrivals, Moment, Plan, Published
from training.evaluation.stream_variants import Prompter
from training.evaluation.updates import Update
from training.evaluation.variants import SnapshotUpdates, nearest_clusters


def test_the_nearest_clusters_are_those_seen_from_the_centre() -> None:
    right, up = np.eye(2, dtype=np.float32)
    snapshot = dataclasses.replace(
        ClusterSnapshot.empty(2),
        ids=np.arange(2),
        centroids=np.stack([right, up]),
        sizes=np.ones(2, np.int64),
        versions=np.ones(2, np.int64),
        conditioning=np.stack([right, up]),
    )
    embedding = unit(np.array([0.9, 0.4], np.float32))
    one = EvaluateSettings(merge_nearest=1)
    assert nearest_clusters(embedding, snapshot, one)[0] == [0]
    centred = dataclasses.replace(snapshot, centre=np.array([0.8, 0.0], np.float32))
    assert nearest_clusters(embedding, centred, one)[0] == [1]


def test_merging_one_cluster_gives_the_update_that_is_served(
    base: FrozenBase,
    random_bundle: Bundle,
    groups: list[Group],
    quick_settings: EvaluateSettings,
    tmp_path: Path,
) -> None:
    windows, random = groups[0].windows, np.random.default_rng(0)
    size, dim = random_bundle.snapshot.centroids.shape
    # All texts lie near the centre: from the origin they look alike.
    centre, *ways = unit(random.standard_normal((1 + len(windows), dim), np.float32))
    embeddings = unit(centre + 0.3 * np.stack(ways))
    centred = dataclasses.replace(
        random_bundle.snapshot,
        centroids=unit(random.standard_normal((size, dim), np.float32)),
        centre=centre,
        threshold=-1.0,
    )
    bundle = dataclasses.replace(random_bundle, snapshot=centred)
    scores = Scores(base, Store(tmp_path), 1, Work())
    common = quick_settings.stream.common.refine
    refinery = Refinery(bundle, quick_settings.refine, common, scores, 0)
    one = quick_settings.model_copy(update={"merge_nearest": 1})
    updates = SnapshotUpdates(refinery, windows, embeddings, one)
    for index in range(len(windows)):
        served = refinery.mean([1.0], [updates.hyper(index)])
        assert updates.merge(index).key == served.key


def _led(tokens: Sequence[int]) -> Window:
    return Window(np.array([0, *tokens], np.int32), 1 + len(tokens) - 2, "d", 2, lead=1)


def test_a_prompt_of_earlier_contexts_begins_as_any_other_and_only_once() -> None:
    windows = [_led([10, 11, 12, 13]), _led([20, 21, 22, 23]), _led([30, 31, 32, 33])]
    plan = Plan(Arrivals(windows, np.zeros((3, 2), np.float32), np.arange(3)), [])
    known = Published(ClusterSnapshot.empty(2), {7: (0, 1)}, {}, None)
    found = Prompter(6, (5,)).prompt(windows[2], plan, Moment(2, known, 7, 1.0))
    assert found.tokens.tolist() == [0, 10, 11, 5, 20, 21, 5, 30, 31, 32, 33]
    assert found.targets.tolist() == [32, 33]
    assert found.content_tokens.tolist() == [10, 11, 5, 20, 21, 5, 30, 31]


def test_each_piece_of_a_documents_own_context_begins_as_a_prompt(
    base: FrozenBase, random_bundle: Bundle, tmp_path: Path
) -> None:
    class Noting(Refinery):
        def refine(
            self, contexts: Sequence[np.ndarray], start: Update, config: RefineConfig
        ) -> Update:
            self.contexts = [context.tolist() for context in contexts]
            return start

    config = RefineConfig(min_prompts=2)
    refinery = Noting(random_bundle, config, config, Scores(base, Store(tmp_path), 1, Work()), 0)
    refinery.own(_led([10, 11, 12, 13, 14, 15]))
    assert refinery.contexts == [[0, 10, 11], [0, 12, 13]]
