"""PrefixCache: which KV blocks hold which beginnings of texts.

Only full blocks are shared, so a shared block is never written again. A block's key stands for all
tokens up to the block's end, and for whatever else its keys and values depend on (the salt).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

KEY_BYTES = 16


def extend_keys(keys: list[bytes], tokens: Sequence[int], block_size: int, salt: str) -> None:
    """Append the keys of the full blocks of `tokens` that `keys` lacks.

    Each key hashes the one before it (the first: `salt`) and its block's tokens, with a hash that
    nobody can find collisions for: callers choose the tokens, and a collision would hand one
    caller's text to another.
    """
    parent = keys[-1] if keys else salt.encode()
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        block = array("q", tokens[start : start + block_size]).tobytes()
        parent = blake2b(block, digest_size=KEY_BYTES, key=parent).digest()
        keys.append(parent)


class PrefixCache:
    """Keys of computed blocks, one block for each key. Knows nothing of who uses a block."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest run of known keys, from the first on."""
        found: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, key: bytes, block: int) -> None:
        """Say that `block` holds `key`. The first block that does so keeps the key."""
        if key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key

    def forget(self, block: int) -> None:
        """`block` is about to hold something else."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]

    def check_integrity(self, held: Sequence[tuple[bytes, int]]) -> None:
        """Assert that keys and blocks match one to one, also for the `held` (key, block) pairs."""
        assert {block: key for key, block in self._blocks.items()} == self._keys
        for key, block in held:
            assert self._keys.get(block, key) == key, f"block {block} is known as another prefix"
