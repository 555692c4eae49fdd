"""StepInputs: what the model reads in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lm_workers.adapters import OFF
from lm_workers.kv_cache import KVCache
from lm_workers.layers.paged import PagedStep
from lm_workers.sequence import Span


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step of T rows.

    Attributes:
        tokens: int64 [T].
        positions: int64 [T], of each token in its sequence.
        slots: int64 [T], adapter slots; None when no token is adapted.
        paged: where the rows live in the KV cache.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor | None
    paged: PagedStep


class InputBuilder:
    """Makes the inputs of a step from its spans.

    Args:
        cache: KV tensors.
        block_size: tokens in a block.
        device: of the model.
    """

    def __init__(self, cache: KVCache, block_size: int, device: torch.device) -> None:
        self._cache, self._block_size, self._device = cache, block_size, device

    def build(self, spans: Sequence[Span]) -> StepInputs:
        """Inputs of the rows of `spans`, one span after the other."""
        tokens = [token for span in spans for token in span.sequence.tokens[span.start : span.stop]]
        positions = [place for span in spans for place in range(span.start, span.stop)]
        return StepInputs(
            self.int64(tokens), self.int64(positions), self._slots(spans), self._paged(spans)
        )

    def alike(self, count: int, start: int, stop: int, blocks: int) -> PagedStep:
        """Tokens `start:stop` of `count` sequences that have `blocks` of the first blocks each."""
        size, ends = self._block_size, torch.arange(1, count + 1) * (stop - start)
        tables = torch.arange(1, 1 + count * blocks, device=self._device).view(count, blocks)
        slots = (tables[:, :, None] * size + torch.arange(size, device=self._device)).flatten(1)
        return PagedStep(
            cache=self._cache,
            block_size=size,
            write_slots=slots[:, start:stop].flatten().contiguous(),
            spans=torch.stack([ends - (stop - start), ends, torch.full_like(ends, stop)], 1),
            lengths=self.int64([stop] * count),
            tables=tables,
        )

    def int64(self, values: Sequence[int]) -> torch.Tensor:
        """The values [N] on the device."""
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _slots(self, spans: Sequence[Span]) -> torch.Tensor | None:
        slots = [span.sequence.slot or OFF for span in spans]
        if not any(slots):
            return None
        return self.int64(slots).repeat_interleave(self.int64([span.length for span in spans]))

    def _paged(self, spans: Sequence[Span]) -> PagedStep:
        size = self._block_size
        blocks = [-(-span.stop // size) for span in spans]
        tables = np.zeros((len(spans), max(blocks)), np.int64)
        write = np.empty(sum(span.length for span in spans), np.int64)
        rows, row = np.empty((len(spans), 3), np.int64), 0
        for number, (span, count) in enumerate(zip(spans, blocks, strict=True)):
            tables[number, :count] = span.sequence.blocks[:count]
            places = np.arange(span.start, span.stop)
            write[row : row + span.length] = tables[number, places // size] * size + places % size
            rows[number] = row, row + span.length, span.stop
            row += span.length
        return PagedStep(
            cache=self._cache,
            block_size=size,
            write_slots=torch.from_numpy(write).to(self._device),
            spans=torch.from_numpy(rows),
            lengths=self.int64([span.stop for span in spans]),
            tables=torch.from_numpy(tables).to(self._device),
        )
