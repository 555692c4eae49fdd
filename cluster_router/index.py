"""Nearest-centroid search and spherical k-means, both by FAISS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from cluster_router.wire.errors import ConfigError
from cluster_router.wire.types import FloatArray

Device = Literal["cpu", "gpu", "auto"]
IntArray = NDArray[np.int64]

_SINGLE_THREAD_BELOW = 20  # queries; under this FAISS scans, and threads only add a wake-up
_TIE_MARGIN = 8  # candidates fetched beyond k, so that ties at the border can be resolved


class CentroidIndex(Protocol):
    """Finds the centroids most similar to each query."""

    def search(self, queries: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """Search for `queries` [N, d].

        Returns:
            similarities float32 [N, k'] in falling order and rows int64 [N, k'], where
            k' = min(k, number of centroids). Equal similarities come in the order of their rows.
        """
        ...


class FaissIndex:
    """Exact inner-product search over `centroids` float32 [K, d].

    FAISS proposes candidates; their similarities are then recomputed here, one pair at a time.
    So a similarity depends on its query and centroid alone, not on the batch size or the device
    (FAISS sums in another order for each), and duplicates of a centroid tie exactly.

    Raises:
        ConfigError: `device="gpu"` and this FAISS build or machine has no GPU.
    """

    def __init__(self, centroids: FloatArray, device: Device = "auto") -> None:
        self._centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self._lock = threading.Lock()  # GPU resources serve one search at a time
        index: faiss.Index = faiss.IndexFlatIP(self._centroids.shape[1])
        self._on_gpu = use_gpu(device)
        if self._on_gpu:
            self._resources = faiss.StandardGpuResources()
            index = faiss.index_cpu_to_gpu(self._resources, 0, index)
        index.add(self._centroids)
        self._index = index

    def search(self, queries: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """See `CentroidIndex.search`."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        k = min(k, len(self._centroids))
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        candidates = self._candidates(queries, min(k + _TIE_MARGIN, len(self._centroids)))
        similarities = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        for i, query in enumerate(queries):
            similarities[i], rows[i] = self._rank(query, candidates[i], k)
        return similarities, rows

    def _candidates(self, queries: FloatArray, count: int) -> IntArray:
        with self._lock, _faiss_threads(len(queries)):
            return self._index.search(queries, count)[1]  # [N, count]

    def _rank(self, query: FloatArray, candidates: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        rows = np.sort(candidates)
        # In double precision, so that rounding to float32 hides the order of summation.
        exact = np.einsum("kd,d->k", self._centroids[rows].astype(np.float64), query)
        similarities = exact.astype(np.float32)
        order = np.argsort(-similarities, kind="stable")[:k]
        return similarities[order], rows[order]


def spherical_kmeans(
    embeddings: FloatArray, k: int, seed: int, device: Device = "auto"
) -> FloatArray:
    """Cluster unit vectors by cosine.

    Args:
        embeddings: float32 [N, d], unit length, N >= k.
        k: number of clusters.
        seed: the result is a function of the embeddings and this number (on a CPU).
        device: where FAISS runs.

    Returns:
        centroids float32 [k, d], unit length.

    Raises:
        ConfigError: fewer embeddings than clusters, or no GPU where one is asked for.
    """
    if not 0 < k <= len(embeddings):
        raise ConfigError(f"cannot make {k} clusters of {len(embeddings)} embeddings", "k")
    kmeans = faiss.Kmeans(
        embeddings.shape[1],
        k,
        niter=25,
        seed=seed,
        spherical=True,
        gpu=use_gpu(device),
        min_points_per_centroid=1,  # silences a warning; few points a cluster are the norm here
        max_points_per_centroid=1024,
    )
    kmeans.train(np.ascontiguousarray(embeddings, dtype=np.float32))
    centroids = np.asarray(kmeans.centroids, np.float32)
    return centroids / np.linalg.norm(centroids, axis=1, keepdims=True)


def use_gpu(device: Device) -> bool:
    """Whether FAISS is to run on a GPU.

    Raises:
        ConfigError: `device="gpu"` and this FAISS build or machine has none.
    """
    built = hasattr(faiss, "StandardGpuResources")
    if device == "gpu" and not built:
        raise ConfigError(
            "this faiss has no GPU support; install faiss-gpu-cu12 in place of faiss-cpu "
            "(pip install 'chameleon-llm[gpu]') or set device to 'auto'",
            "device",
        )
    available = built and faiss.get_num_gpus() > 0
    if device == "gpu" and not available:
        raise ConfigError("faiss finds no GPU; give this process one or use 'auto'", "device")
    return available and device != "cpu"


@contextmanager
def _faiss_threads(queries: int) -> Iterator[None]:
    """Run few queries on the calling thread; leave FAISS its threads for many."""
    threads = faiss.omp_get_max_threads()
    if queries < _SINGLE_THREAD_BELOW:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
