"""Throughput of the learner, latency of assignment, and memory of a cluster."""

from __future__ import annotations

import time
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from cluster_router.clusters import Assigner
from cluster_router.index import FaissIndex
from cluster_router.learner import CentroidLearner
from cluster_router.wire.snapshot import ClusterSnapshot

Floats = NDArray[np.float32]
BATCH = 256


def learner_rate(start: ClusterSnapshot, rows: Floats, batch: int) -> float:
    """Embeddings a second, with a snapshot every 500, in calls of `batch`."""
    learner = CentroidLearner(start)
    began = time.perf_counter()
    for at in range(0, len(rows), batch):
        learner.learn(rows[at : at + batch])
        if at % 500 < batch:
            learner.snapshot()
    return len(rows) / (time.perf_counter() - began)


def _random_snapshot(count: int, dim: int) -> ClusterSnapshot:
    rows = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids, ones = np.arange(count), np.ones(count, np.int64)
    return ClusterSnapshot(1, ids, rows, ones, ones, rows, rows.mean(0), 0.0)


def assign_scale(count: int, dim: int, repeats: int) -> dict[str, Any]:
    """Latency of one assignment, and of batches beside FAISS's own, against `count` centroids."""
    snapshot = _random_snapshot(count, dim)
    assigner = Assigner(snapshot, lambda rows: FaissIndex(rows, "cpu"), "base", "hyper")
    raw = faiss.IndexFlatIP(dim)
    raw.add(snapshot.centroids)
    queries = np.random.default_rng(1).normal(size=(BATCH, dim)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    index = FaissIndex(snapshot.centroids, "cpu")
    ours = _latency(lambda i: assigner.assign(queries[i % BATCH]), repeats)
    theirs = _latency(lambda i: raw.search(queries[i % BATCH][None], 1), repeats)
    return {
        "centroids": count,
        "assign_p50_ms": ours[0],
        "assign_p99_ms": ours[1],
        "faiss_p50_ms": theirs[0],
        "faiss_p99_ms": theirs[1],
        "batch_per_s": BATCH / _latency(lambda _: index.search(queries, 1), 5)[0] * 1000,
        "faiss_batch_per_s": BATCH / _latency(lambda _: raw.search(queries, 1), 5)[0] * 1000,
    }


def _latency(call: Any, repeats: int) -> tuple[float, float]:
    call(0)
    times = []
    for turn in range(repeats):
        began = time.perf_counter()
        call(turn)
        times.append(1000 * (time.perf_counter() - began))
    return float(np.percentile(times, 50)), float(np.percentile(times, 99))


def memory_per_cluster(dim: int) -> dict[str, int]:
    """Bytes one cluster takes, by where it is held."""
    snapshot = _random_snapshot(64, dim)
    learner = CentroidLearner(snapshot)
    per_row = sum(v.nbytes for n, v in snapshot.arrays().items() if v.shape[:1] == (64,)) // 64
    state = sum(v.nbytes for v in learner.state().values() if v.shape[:1] == (64,)) // 64
    centroid = 4 * dim
    return {
        "snapshot": per_row,
        "router (snapshot and FAISS index)": per_row + centroid,
        "learner (beside its snapshot)": per_row + state,
        "file": per_row + state,
    }
