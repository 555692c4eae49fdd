import numpy as np
import pytest
import torch

from cluster_router.embedding import TokenEmbedder
from cluster_router.wire.errors import ConfigError, RequestError

VOCAB, DIM = 50, 16
MATRIX = np.random.default_rng(1).normal(size=(VOCAB, DIM)).astype(np.float32)
WEIGHTS = np.random.default_rng(2).uniform(size=VOCAB).astype(np.float32)


def test_is_the_normalised_weighted_mean() -> None:
    tokens = [3, 3, 7, 41]
    mean = np.average(MATRIX[tokens].astype(np.float64), axis=0, weights=WEIGHTS[tokens])
    got = TokenEmbedder(MATRIX, WEIGHTS).embed(tokens)
    assert got.dtype == np.float32
    assert np.allclose(got, mean / np.linalg.norm(mean), atol=1e-6)


def test_weights_and_repeats_move_the_result() -> None:
    plain, weighted = TokenEmbedder(MATRIX), TokenEmbedder(MATRIX, WEIGHTS)
    assert not np.allclose(plain.embed([1, 2]), weighted.embed([1, 2]), atol=1e-3)
    assert not np.allclose(plain.embed([1, 2]), plain.embed([1, 2, 2, 2]), atol=1e-3)


def test_bfloat16_is_kept_and_close() -> None:
    matrix = torch.from_numpy(MATRIX).bfloat16()
    embedder = TokenEmbedder(matrix)
    assert embedder.embed([1, 2, 3]) @ TokenEmbedder(MATRIX).embed([1, 2, 3]) > 0.999
    assert embedder._embedding.data_ptr() == matrix.data_ptr()


def test_empty_content_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one token"):
        TokenEmbedder(MATRIX).embed([])


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(RequestError, match=r"0\.\.49"):
        TokenEmbedder(MATRIX).embed([0, token])


def test_weightless_tokens_alone_count_alike() -> None:
    embedder = TokenEmbedder(MATRIX, np.zeros(VOCAB, np.float32))
    assert np.array_equal(embedder.embed([1, 2]), TokenEmbedder(MATRIX).embed([1, 2]))


def test_tokens_that_cancel_out_give_zeros_not_nan() -> None:
    got = TokenEmbedder(np.array([[1.0, 2.0], [-1.0, -2.0]], np.float32)).embed([0, 1])
    assert np.array_equal(got, np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "weights", [np.ones(VOCAB - 1), np.full(VOCAB, np.nan), np.full(VOCAB, -1.0)]
)
def test_unusable_weights_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="token_weights"):
        TokenEmbedder(MATRIX, weights.astype(np.float32))
