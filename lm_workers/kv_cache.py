"""Paged KV cache: blocks of tokens, owned by sequences, and the tensors behind them."""

from __future__ import annotations

from collections import deque

import torch
from transformers import PretrainedConfig


class BlockPool:
    """Hands out block numbers. Knows nothing of tensors.

    Block 0 is never handed out: it is where rows that only pad a batch read and write.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(1, num_blocks))

    @property
    def free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing else is cached."""
        return (self.num_blocks - 1) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens need."""
        return -(-tokens // self.block_size)

    def can_extend(self, blocks: list[int], tokens: int) -> bool:
        """Whether `blocks` can grow to hold `tokens` tokens."""
        return self.blocks_for(tokens) - len(blocks) <= len(self._free)

    def extend(self, blocks: list[int], tokens: int) -> None:
        """Grow `blocks` in place to hold `tokens` tokens. Ask `can_extend` first."""
        while len(blocks) * self.block_size < tokens:
            blocks.append(self._free.popleft())

    def release(self, blocks: list[int]) -> None:
        """Take all of `blocks` back and empty the list."""
        self._free.extend(blocks)
        blocks.clear()

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Assert that every block is free or owned exactly once."""
        seen = sorted([*self._free, *(block for blocks in owned for block in blocks)])
        assert seen == list(range(1, self.num_blocks)), "KV blocks lost or owned twice"


class KVCache:
    """Keys and values of every layer, addressed by token slot = block * block_size + offset."""

    def __init__(
        self, config: PretrainedConfig, num_slots: int, dtype: torch.dtype, device: str
    ) -> None:
        layers, heads, head_dim = kv_geometry(config)
        shape = (num_slots, heads, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store `keys` and `values` [T, heads, head_dim] at `slots` [T]."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at `slots` [...]: [..., heads, head_dim]."""
        return self.keys[layer][slots], self.values[layer][slots]


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
