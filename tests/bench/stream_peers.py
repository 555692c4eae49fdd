"""What the learner is measured against: offline k-means, scikit-learn's and river's clusterers."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster_router.index import spherical_kmeans

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
NONE = -1


def offline(rows: Floats, count: int, seed: int) -> Labels:
    """FAISS's spherical k-means on the whole stream at once: it has seen the future."""
    return np.asarray((rows @ spherical_kmeans(rows, count, seed, "cpu").T).argmax(1))


def centred(rows: Floats, mean: Floats) -> Floats:
    """`rows` as they differ from `mean`, at unit length."""
    away = rows - mean
    return np.asarray(away / np.linalg.norm(away, axis=1, keepdims=True), np.float32)


def principal(rows: Floats, known: Floats, dim: int) -> Floats:
    """`rows` in the first `dim` principal directions of `known`, at unit length."""
    mean = known.mean(0)
    _, _, directions = np.linalg.svd(known - mean, full_matrices=False)
    found = (rows - mean) @ directions[:dim].T
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def mini_batch_kmeans(rows: Floats, count: int, start: Floats | None, batch: int) -> Labels:
    """scikit-learn's MiniBatchKMeans; each batch is labelled before it is learned."""
    cluster = importlib.import_module("sklearn.cluster")
    begin = rows[:count] if start is None else np.vstack([start, rows[: count - len(start)]])
    model = cluster.MiniBatchKMeans(len(begin), init=begin, n_init=1, random_state=0)
    model.partial_fit(begin)  # its first call needs as many rows as there are clusters
    labels = np.full(len(rows), NONE)
    first = count if start is None else 0
    for at in range(first, len(rows), batch):
        labels[at : at + batch] = model.predict(rows[at : at + batch])
        model.partial_fit(rows[at : at + batch])
    return labels


def birch(rows: Floats, count: int, batch: int) -> Labels:
    """scikit-learn's Birch, labelled once at the end, as it renumbers its clusters on the way."""
    cluster = importlib.import_module("sklearn.cluster")
    model = cluster.Birch(threshold=0.25, n_clusters=None)
    for at in range(0, len(rows), batch):
        model.partial_fit(rows[at : at + batch])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_params(n_clusters=count)
        model.partial_fit(None)
    return np.asarray(model.predict(rows))


def river_models(count: int) -> dict[str, Callable[[], Any]]:
    """River's clusterers with `count` clusters where they take a number; others by default."""
    cluster = importlib.import_module("river.cluster")
    return {
        "river KMeans": lambda: cluster.KMeans(count, halflife=0.02, sigma=0.01, seed=0),
        "river STREAMKMeans": lambda: cluster.STREAMKMeans(
            chunk_size=200, n_clusters=count, halflife=0.02, sigma=0.01, seed=0
        ),
        "river CluStream": lambda: cluster.CluStream(
            n_macro_clusters=count, max_micro_clusters=2 * count, time_gap=500, seed=0
        ),
        "river DBSTREAM": lambda: cluster.DBSTREAM(
            clustering_threshold=0.3, fading_factor=0.001, cleanup_interval=200
        ),
    }


def river(make: Callable[[], Any], rows: Floats, seconds: float) -> Labels:
    """Labels of as many rows as one of river's models gets through in `seconds`."""
    model, labels, began = make(), [], time.perf_counter()
    for row in rows.tolist():
        if time.perf_counter() - began > seconds:
            break
        features = dict(enumerate(row))
        try:
            labels.append(int(model.predict_one(features)))
        except (KeyError, IndexError, ValueError, AttributeError, ZeroDivisionError):
            labels.append(NONE)  # nothing has been clustered yet
        model.learn_one(features)
    return np.array(labels)
