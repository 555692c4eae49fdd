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

_FEW = 20  # queries; under this FAISS scans, and threads only add a wake-up
_TIE_MARGIN = 8  # candidates fetched beyond k, so that ties at the border can be resolved
_BYTES_FROM = 4096  # centroids; below that float32 stays in the processor's cache anyway
_BYTES_MARGIN = 24  # candidates beyond k where they are ranked by bytes
_RANKED_AT_ONCE = 64  # queries; bounds the copy of their candidates


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
    """Inner-product search over `centroids` float32 [K, d].

    FAISS proposes candidates; their similarities are then recomputed here, one pair at a time.
    So a similarity depends on its query and centroid alone, not on the batch size or the device
    (FAISS sums in another order for each), and duplicates of a centroid tie exactly.

    The candidates are exact, but for few queries against 4,096 centroids or more on a CPU: there
    reading the centroids is what takes the time, so a copy rounded to whole bytes proposes. What it
    misses is a centroid that 24 others come within rounding (about 0.001) of.

    Raises:
        ConfigError: `device="gpu"` and this FAISS build or machine has no GPU.
    """

    def __init__(self, centroids: FloatArray, device: Device = "auto") -> None:
        self._centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self._lock = threading.Lock()  # GPU resources serve one search at a time
        dim = self._centroids.shape[1]
        index: faiss.Index = faiss.IndexFlatIP(dim)
        self._on_gpu = use_gpu(device)
        if self._on_gpu:
            self._resources = faiss.StandardGpuResources()
            index = faiss.index_cpu_to_gpu(self._resources, 0, index)
        index.add(self._centroids)
        self._index = index
        self._bytes: faiss.Index | None = None
        if not self._on_gpu and len(self._centroids) >= _BYTES_FROM:
            # Of FAISS's kinds with a byte a number, the one that multiplies whole numbers: 10,000
            # centroids take it a third of the time that scaling each back takes.
            kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
            self._bytes = faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT)
            self._bytes.add(_whole_bytes(self._centroids))

    def search(self, queries: FloatArray, k: int) -> tuple[FloatArray, IntArray]:
        """See `CentroidIndex.search`."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        k = min(k, len(self._centroids))
        if k == 0 or len(queries) == 0:
            return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        candidates = np.sort(self._candidates(queries, k), axis=1)
        parts = [
            self._rank(queries[at : at + _RANKED_AT_ONCE], candidates[at : at + _RANKED_AT_ONCE], k)
            for at in range(0, len(queries), _RANKED_AT_ONCE)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part[0] for part in parts]), np.concatenate([p[1] for p in parts])

    def _candidates(self, queries: FloatArray, k: int) -> IntArray:
        index, margin = self._index, _TIE_MARGIN
        if self._bytes is not None and len(queries) < _FEW:
            index, margin, queries = self._bytes, _BYTES_MARGIN, _whole_bytes(queries)
        with self._lock, _faiss_threads(len(queries)):
            return index.search(queries, min(k + margin, len(self._centroids)))[1]  # [N, count]

    def _rank(self, queries: FloatArray, rows: IntArray, k: int) -> tuple[FloatArray, IntArray]:
        """The best `k` of the candidates `rows` [N, count], which rise."""
        # In double precision, so that rounding to float32 hides the order of summation.
        near = self._centroids[rows].astype(np.float64)  # [N, count, d]
        exact = np.einsum("nkd,nd->nk", near, queries.astype(np.float64))
        similarities = exact.astype(np.float32)
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        picked = np.arange(len(rows))[:, None], order
        return similarities[picked], rows[picked]


def _whole_bytes(rows: FloatArray) -> FloatArray:
    """`rows` at a scale, the same for all, at which they can be rounded to -127...127; rounded."""
    most = np.abs(rows).max() or np.float32(1)
    return np.rint(rows / most * np.float32(127))


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
    if queries < _FEW:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
