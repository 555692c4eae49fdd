import numpy as np
import pytest
import torch

from cluster_router.vocabulary import CharacteristicTokens

DIM = 64
WORDS = [" sail", " Sail", " sails", " mast", " judge", " law", " a", "sail", " x1y", "<s>", "\n"]


@pytest.fixture(scope="module")
def embedding() -> np.ndarray:
    """Ship words share axis 60, court words axis 61; 500 fillers vary along axes 0 to 19."""
    rng = np.random.default_rng(0)
    matrix = 0.05 * rng.normal(size=(len(WORDS) + 500, DIM))
    matrix[[0, 1, 2, 3, 6, 7, 8, 9, 10], 60] += np.linspace(1, 2, 9)
    matrix[[4, 5], 61] += 1
    matrix[len(WORDS) :, :20] += rng.normal(size=(500, 20)) * np.linspace(5, 1, 20)
    return matrix.astype(np.float32)


def text_of(token: int) -> str:
    if token < len(WORDS):
        return WORDS[token]
    return " filler" + "".join(chr(ord("a") + int(digit)) for digit in str(token))


def axis(index: int) -> np.ndarray:
    return np.eye(DIM, dtype=np.float32)[index]


def test_names_readable_words_of_the_topic_without_variants(embedding: np.ndarray) -> None:
    ship, court = CharacteristicTokens(embedding, text_of, count=2)(np.stack([axis(60), axis(61)]))
    assert set(ship) == {"mast", "sails"}
    assert set(court) == {"judge", "law"}


def test_a_direction_common_to_the_vocabulary_does_not_hide_the_topic(
    embedding: np.ndarray,
) -> None:
    [words] = CharacteristicTokens(embedding, text_of, count=2)((axis(60) + axis(0))[None])
    assert set(words) == {"mast", "sails"}


def test_depends_on_the_direction_alone(embedding: np.ndarray) -> None:
    name = CharacteristicTokens(torch.from_numpy(embedding).bfloat16(), text_of)
    directions = np.random.default_rng(1).normal(size=(300, DIM)).astype(np.float32)
    assert name(directions)[17] == name(directions[17:18])[0]
    assert name(directions) == name(2 * directions)


def test_a_vocabulary_without_words_names_nothing(embedding: np.ndarray) -> None:
    name = CharacteristicTokens(embedding, lambda token: f"<{token}>")
    assert name(np.ones((2, DIM), np.float32)) == [(), ()]
