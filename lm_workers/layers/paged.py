"""PagedStep: where the tokens of one step live in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from lm_workers.kv_cache import KVCache

KV_ALIGN = 32
"""Torch's attention reads keys and values in multiples of this many tokens.

Vectorised kernels treat the remainder of a row apart from the rest and round it differently. With
whole multiples a sequence's numbers do not depend on how long its neighbours are.
"""


@dataclass(frozen=True)
class PagedStep:
    """A step runs all its tokens as one flat sequence of T rows; this says which belong together.

    Attributes:
        cache: the tensors.
        block_size: tokens in a block.
        write_slots: int64 [T], where each token's key and value go.
        spans: int64 [S, 3] on the CPU: first row, stop row, and tokens of the sequence up to the
            stop. Spans of one row come first.
        lengths: int64 [S], those tokens of the sequences, on the device. Where they are less than
            in `spans`, they count: a step that is recorded for later is as large as it can be.
        tables: int64 [S, B] blocks of each span's sequence, padded with block 0.
    """

    cache: KVCache
    block_size: int
    write_slots: torch.Tensor
    spans: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor

    def slots_of(self, span: int, length: int) -> torch.Tensor:
        """Cache slots [length] of the first tokens of one span's sequence."""
        blocks = self.tables[span, : -(-length // self.block_size)]
        offsets = torch.arange(self.block_size, device=blocks.device)
        return (blocks[:, None] * self.block_size + offsets).flatten()[:length]

    @cached_property
    def token_slots(self) -> torch.Tensor:
        """Cache slots [S, L] of each span's sequence, padded to a multiple of `KV_ALIGN`."""
        offsets = torch.arange(self.block_size, device=self.tables.device)
        slots = (self.tables[:, :, None] * self.block_size + offsets).flatten(1)
        length = -(-max(self.spans[:, 2].tolist()) // KV_ALIGN) * KV_ALIGN
        return F.pad(slots, (0, max(0, length - slots.shape[1])))[:, :length]
