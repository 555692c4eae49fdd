"""Paged KV cache: blocks of tokens, used by sequences, and the tensors behind them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain
from math import prod

import torch
from transformers import PretrainedConfig

from lm_workers.memory import untouched
from lm_workers.prefix_cache import PrefixCache


class BlockPool:
    """Hands out block numbers and counts who uses them. Knows nothing of tensors.

    Block 0 is never handed out: it is where rows that only pad a batch read and write.
    A block that nobody uses keeps what it holds until it is handed out again, and those with a
    known prefix are handed out last, least recently used first.

    Args:
        num_blocks: including block 0.
        block_size: tokens in a block.
        prefixes: learns which blocks lose what they hold; None shares nothing.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefixes: PrefixCache | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefixes = prefixes
        self._users = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def free(self) -> int:
        """Blocks nobody uses."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing else is cached."""
        return (self.num_blocks - 1) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def free_without(self, blocks: Iterable[int]) -> int:
        """Blocks that would be free if `blocks` were in use."""
        return len(self._free) - sum(block in self._free for block in blocks)

    def can_extend(self, blocks: list[int], tokens: int) -> bool:
        """Whether `blocks` can grow to hold `tokens` tokens."""
        return self.blocks_for(tokens) - len(blocks) <= len(self._free)

    def extend(self, blocks: list[int], tokens: int) -> None:
        """Grow `blocks` in place to hold `tokens` tokens. Ask `can_extend` first."""
        while len(blocks) * self.block_size < tokens:
            block, _ = self._free.popitem(last=False)
            if self.prefixes is not None:
                self.prefixes.forget(block)
            self._users[block] = 1
            blocks.append(block)

    def share(self, blocks: Iterable[int]) -> None:
        """Count one more user of each of `blocks`, which hold something worth keeping."""
        for block in blocks:
            self._users[block] += 1
            self._free.pop(block, None)

    def release(self, blocks: list[int]) -> None:
        """Count one user less of each of `blocks` and empty the list."""
        # From the end: what a prefix ends with is of use to fewer than what it begins with.
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                if self.prefixes is None or block not in self.prefixes:
                    self._free.move_to_end(block, last=False)
        blocks.clear()

    def check_integrity(self, owned: Iterable[list[int]]) -> None:
        """Assert that `owned` is exactly who uses what, and that the rest is free."""
        users = [0] * self.num_blocks
        for block in chain.from_iterable(owned):
            users[block] += 1
        assert users == self._users, "KV blocks lost or counted wrongly"
        unused = {block for block in range(1, self.num_blocks) if not users[block]}
        assert unused == self._free.keys(), "KV blocks in use and free at once, or neither"


class KVCache:
    """Keys and values of every layer, addressed by token slot = block * block_size + offset."""

    def __init__(
        self, config: PretrainedConfig, num_slots: int, dtype: torch.dtype, device: str
    ) -> None:
        layers, heads, head_dim = kv_geometry(config)
        shape = (num_slots, heads, head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in range(layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(layers)]

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store `keys` and `values` [T, heads, head_dim] at `slots` [T]."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at `slots` [...]: [..., heads, head_dim]."""
        return self.keys[layer][slots], self.values[layer][slots]


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros that on a CPU take memory only where something was written."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write to it all.
    return untouched(prod(shape) * dtype.itemsize).view(dtype).view(shape)


def kv_geometry(config: PretrainedConfig) -> tuple[int, int, int]:
    """Layers, KV heads and head size of a model, whatever its family calls them."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_dim


def bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """KV bytes that one token takes over all layers."""
    layers, kv_heads, head_dim = kv_geometry(config)
    return 2 * layers * kv_heads * head_dim * dtype.itemsize
