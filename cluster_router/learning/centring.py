"""Looking at embeddings from the mean of all traffic instead of from the origin.

Mean token embeddings of any two prompts are alike: they share what all text shares. What tells
topics apart is how they differ from the mean prompt, and cosines taken from there show it. The
hypernetwork goes on to be given mean prompts as seen from the origin, as in its training.
"""

from __future__ import annotations

import numpy as np

from cluster_router.learning.structure import OUTSIDE, View
from cluster_router.learning.table import ClusterTable
from cluster_router.wire.snapshot import project, unit
from cluster_router.wire.types import FloatArray


def move_origin(
    table: ClusterTable, window: FloatArray, threshold: float, centre: FloatArray
) -> None:
    """Turn the centroids of `table` to how they look from `centre` [d].

    Each becomes the mean of its members in `window` [n, d] and of what it stood for before. No
    cluster counts as moved by this alone.

    Args:
        table: clusters as seen from the origin.
        window: recent embeddings.
        threshold: cosine under which one belongs to no cluster, from the origin.
        centre: the new one.
    """
    if len(table) == 0:
        return
    view = View.of(window, table.centroids, threshold)
    inside = view.rows != OUTSIDE
    # A cluster's mean prompt is shorter than one, by about as much for all of them.
    length = float(view.similarities[inside].mean()) if inside.any() else 1.0
    before = unit(length * table.centroids - centre)  # [K, d]
    sums = np.zeros_like(before)
    np.add.at(sums, view.rows[inside], project(window[inside], centre))
    # Members scatter about their centroid: their sum is shorter than their number.
    tight = float(np.einsum("kd,kd->", sums, before)) / max(1, int(inside.sum()))
    table.centroids = unit(max(tight, 0.1) * table.weights[:, None] * before + sums)
    table.anchors = table.centroids.copy()


def measure_reach(table: ClusterTable, window: FloatArray, centre: FloatArray) -> None:
    """Find how far from `centre` [d] each cluster's mean prompt is, by its members in `window`."""
    away = window - centre
    rows = (unit(away) @ table.centroids.T).argmax(1)
    along = np.einsum("nd,nd->n", away, table.centroids[rows])
    counts = np.bincount(rows, minlength=len(table))
    sums = np.bincount(rows, along, minlength=len(table))
    table.reach = np.where(counts > 0, sums / np.maximum(counts, 1), table.reach)
    table.reach = np.where(table.reach > 0, table.reach, along.mean()).astype(np.float32)
