"""Clusters of contexts: token weights, snapshot, assignment, the shuffled control."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster_router.wire.errors import ConfigError
from training.clusters import (
    NO_CLUSTER,
    Conditions,
    assign,
    embed_contexts,
    fit_snapshot,
    idf_weights,
    mutual_information,
    shuffled,
)
from training.config import ClusterSettings
from training.data import Window


def _window(tokens: list[int], context: int, domain: str = "d") -> Window:
    return Window(np.array(tokens, np.int32), context, domain, 1)


@pytest.fixture
def embeddings() -> np.ndarray:
    """Three tight groups of 20 unit vectors."""
    random = np.random.default_rng(0)
    points = np.repeat(np.eye(8, dtype=np.float32)[:3], 20, axis=0)
    points = points + 0.05 * random.standard_normal(points.shape, np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_a_token_of_every_context_weighs_nothing_and_a_rare_one_most() -> None:
    windows = [_window([0, 1, 9], 2), _window([0, 2, 9], 2), _window([0, 2, 9], 2)]
    weights = idf_weights(windows, torch.ones(10, 4))
    assert weights[0] < 0.5 * weights[2] < weights[1] == pytest.approx(1.0)
    assert weights[9] == weights[1], "scored tokens must not be counted"


def test_long_embeddings_do_not_count_more() -> None:
    embedding = torch.ones(10, 4)
    embedding[1] *= 5
    weights = idf_weights([_window([0, 1, 2], 2), _window([0, 3, 2], 2)], embedding)
    assert weights[1] == pytest.approx(weights[3] / 5)


def test_only_the_context_is_embedded() -> None:
    from cluster_router.embedding import TokenEmbedder

    embedder = TokenEmbedder(torch.eye(6))
    same = embed_contexts([_window([1, 2, 3], 2), _window([1, 2, 5, 5], 2)], embedder)
    np.testing.assert_array_equal(same[0], same[1])


def test_groups_become_clusters_and_strangers_belong_to_none(embeddings: np.ndarray) -> None:
    snapshot = fit_snapshot(embeddings, ClusterSettings(count=3, threshold_percentile=0), seed=0)
    rows = assign(embeddings, snapshot)
    assert sorted(snapshot.sizes.tolist()) == [20, 20, 20]
    assert mutual_information(rows, [str(i // 20) for i in range(60)]) == pytest.approx(1.0)
    stranger = np.eye(8, dtype=np.float32)[7:]
    assert assign(stranger, snapshot).tolist() == [NO_CLUSTER]
    assert Conditions.of(assign(stranger, snapshot), snapshot).support.tolist() == [0.0]


def test_conditions_are_those_of_the_assigned_cluster(embeddings: np.ndarray) -> None:
    snapshot = fit_snapshot(embeddings, ClusterSettings(count=3, threshold_percentile=0), seed=0)
    rows = assign(embeddings, snapshot)
    conditions = Conditions.of(rows, snapshot)
    np.testing.assert_array_equal(conditions.vectors.numpy(), snapshot.conditioning[rows])
    assert (conditions.support == 20).all()


def test_more_clusters_than_contexts_are_refused(embeddings: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"clusters\.count"):
        fit_snapshot(embeddings[:5], ClusterSettings(count=6), seed=0)


def test_the_shuffled_control_never_keeps_a_cluster(embeddings: np.ndarray) -> None:
    snapshot = fit_snapshot(embeddings, ClusterSettings(count=3, threshold_percentile=0), seed=0)
    rows = assign(embeddings, snapshot)
    rows[4] = NO_CLUSTER
    moved = shuffled(rows, snapshot, seed=0)
    assert moved[4] == NO_CLUSTER
    assert (np.delete(moved, 4) != np.delete(rows, 4)).all()
    assert set(moved.tolist()) <= {NO_CLUSTER, 0, 1, 2}


def test_mutual_information_of_independent_labels_is_zero() -> None:
    rows = np.array([0, 0, 1, 1])
    assert mutual_information(rows, ["a", "b", "a", "b"]) == pytest.approx(0.0, abs=1e-12)
    assert mutual_information(rows, ["a", "a", "b", "b"]) == pytest.approx(1.0)
