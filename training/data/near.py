"""Near-duplicates: texts that share most of their runs of five words, by MinHash."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from training.data.optional import load

_WORDS = 5
_SIMILARITY = 0.6
"""Share of the runs of words that two texts have in common (Jaccard) from which they are near."""
_PERMUTATIONS = 128
_MULTIPLIER = np.uint32(0x9E3779B1)  # odd, so that no bit of a word's hash is lost


class NearDuplicates:
    """Remembers texts and tells whether another is much like one of them.

    Words are what white space separates, so that text written without it is compared by sentence
    or paragraph. Takes some 7 KB of memory for each text.

    Raises:
        SetupError: `datasketch` is not installed.
    """

    def __init__(self) -> None:
        datasketch = load(
            "datasketch",
            "datasketch",
            "leaving out near-duplicates (data.near_duplicates; `keep` does without)",
        )
        # Copies share the permutations, which would otherwise be drawn anew for each document.
        self._empty = datasketch.MinHash(_PERMUTATIONS, hashfunc=int)
        self._index = datasketch.MinHashLSH(_SIMILARITY, _PERMUTATIONS)
        self._sketches: list[NDArray[np.uint64]] = []

    def seen(self, text: str) -> bool:
        """Whether a text like this was seen before; if not, it is from now on."""
        sketch = self._empty.copy()
        sketch.update_batch(shingles(text).tolist())
        values = sketch.hashvalues
        for index in self._index.query(sketch):
            if np.mean(self._sketches[index] == values) >= _SIMILARITY:
                return True
        self._index.insert(len(self._sketches), sketch, check_duplication=False)
        self._sketches.append(values)
        return False


def shingles(text: str) -> NDArray[np.uint32]:
    """A hash of each run of five words, of all the words where there are fewer."""
    words = text.lower().split()
    hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint32, len(words))
    length = min(_WORDS, len(words))
    runs = np.zeros(len(words) - length + 1, np.uint32)
    for offset in range(length):
        runs = runs * _MULTIPLIER + hashes[offset : offset + len(runs)]
        runs ^= runs >> np.uint32(15)
    return np.unique(runs)
