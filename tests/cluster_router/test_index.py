import faiss
import numpy as np
import pytest

from cluster_router.index import FaissIndex, spherical_kmeans, use_gpu
from cluster_router.wire.errors import ConfigError

HAS_GPU = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
DEVICES = [
    "cpu",
    pytest.param(
        "gpu",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="faiss sees no GPU")],
    ),
]


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("count", [1, 2, 300])
def test_agrees_with_brute_force(device: str, count: int) -> None:
    rng = np.random.default_rng(count)
    centroids, queries = unit(rng, count, 24), unit(rng, 30, 24)
    similarities, rows = FaissIndex(centroids, device).search(queries, 3)
    exact = queries.astype(np.float64) @ centroids.T.astype(np.float64)
    expected = np.argsort(-exact, axis=1)[:, :3]
    assert np.array_equal(rows, expected)
    assert np.allclose(similarities, np.take_along_axis(exact, expected, 1), atol=1e-6)
    assert similarities.dtype == np.float32


def test_duplicates_tie_in_row_order(device: str) -> None:
    rng = np.random.default_rng(0)
    centroids = unit(rng, 40, 24)
    for copy in (3, 30, 31, 39):
        centroids[copy] = centroids[17]
    similarities, rows = FaissIndex(centroids, device).search(centroids[17:18], 5)
    assert rows.tolist() == [[3, 17, 30, 31, 39]]
    assert len(set(similarities[0].tolist())) == 1


def test_a_query_does_not_depend_on_its_batch(device: str) -> None:
    rng = np.random.default_rng(5)
    index, queries = FaissIndex(unit(rng, 500, 64), device), unit(rng, 100, 64)
    together = index.search(queries, 2)
    alone = [index.search(query[None], 2) for query in queries]
    assert np.array_equal(together[0], np.concatenate([one[0] for one in alone]))
    assert np.array_equal(together[1], np.concatenate([one[1] for one in alone]))


def test_no_centroids_and_no_queries(device: str) -> None:
    empty = FaissIndex(np.empty((0, 8), np.float32), device)
    assert [part.shape for part in empty.search(np.ones((2, 8), np.float32), 1)] == [(2, 0)] * 2
    index = FaissIndex(np.eye(8, dtype=np.float32), device)
    assert [p.shape for p in index.search(np.empty((0, 8), np.float32), 1)] == [(0, 1)] * 2


def test_threads_are_left_as_they_were() -> None:
    before = faiss.omp_get_max_threads()
    FaissIndex(np.eye(8, dtype=np.float32), "cpu").search(np.eye(8, dtype=np.float32), 1)
    assert faiss.omp_get_max_threads() == before


@pytest.mark.skipif(HAS_GPU, reason="faiss sees a GPU")
def test_gpu_without_a_gpu_names_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"faiss-gpu|give this process one"):
        FaissIndex(np.eye(4, dtype=np.float32), "gpu")
    assert not use_gpu("auto")


def test_kmeans_finds_what_was_planted() -> None:
    rng = np.random.default_rng(3)
    directions = unit(rng, 6, 32)
    points = np.repeat(directions, 50, axis=0) + 0.1 * rng.normal(size=(300, 32))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    centroids = spherical_kmeans(points, 6, seed=0)
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    similarities, rows = FaissIndex(centroids).search(directions, 1)
    assert sorted(rows[:, 0].tolist()) == list(range(6))
    assert similarities.min() > 0.98


def test_kmeans_is_a_function_of_its_seed() -> None:
    points = unit(np.random.default_rng(4), 400, 16)
    first = spherical_kmeans(points, 9, seed=1)
    assert np.array_equal(first, spherical_kmeans(points, 9, seed=1))
    assert not np.array_equal(first, spherical_kmeans(points, 9, seed=2))


@pytest.mark.parametrize("k", [0, 5])
def test_kmeans_refuses_more_clusters_than_points(k: int) -> None:
    with pytest.raises(ConfigError, match="embeddings"):
        spherical_kmeans(np.eye(4, dtype=np.float32), k, seed=0)


def test_bytes_propose_for_few_queries_and_change_no_answer() -> None:
    rng = np.random.default_rng(7)
    topics = unit(rng, 40, 48)
    centroids = topics[rng.integers(40, size=5000)] + 0.05 * rng.normal(size=(5000, 48))
    centroids = (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float32)
    queries = centroids[::50] + 0.02 * rng.normal(size=(100, 48)).astype(np.float32)
    index = FaissIndex(centroids, "cpu")
    assert index._bytes is not None
    assert FaissIndex(centroids[:100], "cpu")._bytes is None
    together = index.search(queries, 1)  # by FAISS's exact search
    assert np.array_equal(together[1][:, 0], (queries @ centroids.T).argmax(1))
    alone = [index.search(query[None], 1) for query in queries]
    assert np.array_equal(together[0], np.concatenate([one[0] for one in alone]))
    assert np.array_equal(together[1], np.concatenate([one[1] for one in alone]))
