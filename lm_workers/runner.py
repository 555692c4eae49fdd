"""ModelRunner: one step of the frozen model over a batch of spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from cluster_router.wire.errors import ModelError
from lm_workers.adapters import OFF, AdapterBank, RowSlots
from lm_workers.attention import PAGED
from lm_workers.kv_cache import KVCache
from lm_workers.layers.head import AdaptedHead
from lm_workers.layers.install import install
from lm_workers.layers.kernels import Kernels
from lm_workers.layers.linear import Product
from lm_workers.layers.paged import PagedStep
from lm_workers.sequence import Batch, Span

T = TypeVar("T")

_SCORED_ROWS = 256
"""Prompt positions whose logits exist at one time; bounds memory when a long text is scored."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step leaves behind.

    Attributes:
        hidden: [T, d], final hidden states of every token of the batch.
        slots: int64 [T] adapter slots of the tokens, None when no token is adapted.
        offsets: row at which each span starts.
    """

    hidden: torch.Tensor
    slots: torch.Tensor | None
    offsets: tuple[int, ...]


class ModelRunner:
    """Runs batches through a transformers model, with the KV cache and the updates.

    Takes the model over: its layers are replaced by ours.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface.
        cache: KV tensors.
        block_size: tokens in a block.
        bank: resident updates; None serves the base model alone.
        layout: of the weights.
        kernels: compute what is not a matrix product.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        block_size: int,
        bank: AdapterBank | None,
        layout: type[Product],
        kernels: Kernels,
    ) -> None:
        self._device = model.device
        self._cache, self._block_size, self._kernels = cache, block_size, kernels
        self._rows, self._min_rows = RowSlots(), layout.min_rows
        reference = self._reference(model)
        self.head = AdaptedHead(model.get_output_embeddings(), layout, kernels, bank)
        install(model, layout, kernels, bank, self._rows)
        model.set_attn_implementation(PAGED)
        self._body = model.base_model
        self._check_same(*reference)

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepOutput:
        """Compute keys, values and final hidden states of every token in the batch."""
        spans = self._enough(batch.spans) if batch.num_tokens == 1 else batch.spans
        tokens = [token for span in spans for token in span.sequence.tokens[span.start : span.stop]]
        positions = [place for span in spans for place in range(span.start, span.stop)]
        slots = self._slots(spans)
        self._rows.tokens = slots
        hidden = self._hidden(self._int64(tokens), self._int64(positions), self._paged(spans))
        offsets, row = [], 0
        for span in batch.spans:
            offsets.append(row)
            row += span.length
        return StepOutput(hidden, slots, tuple(offsets))

    @torch.inference_mode()
    def logits(self, output: StepOutput, rows: list[int]) -> torch.Tensor:
        """Adapted logits [len(rows), vocab] of some of a step's rows."""
        index = self._int64(self._enough(rows))
        slots = None if output.slots is None else output.slots[index]
        return self.head(output.hidden[index], slots)[: len(rows)]

    def _hidden(
        self, tokens: torch.Tensor, positions: torch.Tensor, paged: PagedStep
    ) -> torch.Tensor:
        """Final hidden states [T, d] of tokens [T] at positions [T]."""
        hidden: torch.Tensor = self._body(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            paged=paged,
            kernels=self._kernels,
        ).last_hidden_state[0]
        return hidden

    def _enough(self, rows: Sequence[T]) -> Sequence[T]:
        """Repeat a lone row where it would be summed in another order than rows in company."""
        return [*rows] * self._min_rows if len(rows) == 1 else rows

    def _int64(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _slots(self, spans: Sequence[Span]) -> torch.Tensor | None:
        slots = [span.sequence.slot or OFF for span in spans]
        if not any(slots):
            return None
        return self._int64(slots).repeat_interleave(self._int64([span.length for span in spans]))

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
            tables=torch.from_numpy(tables).to(self._device),
        )

    @torch.inference_mode()
    def _reference(self, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """A few tokens and the logits that transformers itself gives for them."""
        length = min(2 * self._block_size, self._cache.keys[0].shape[0] - self._block_size)
        tokens = torch.arange(1, length + 1, device=self._device) % model.config.vocab_size
        return tokens, model(input_ids=tokens[None], use_cache=False).logits[0]

    @torch.inference_mode()
    def _check_same(self, tokens: torch.Tensor, expected: torch.Tensor) -> None:
        """Refuse a model whose class does something that this runner leaves out.

        Examples are scaled or capped logits. Better to fail here than to serve other numbers. The
        median position counts: in half precision single ones swing with the order of a sum.
        """
        count, size = len(tokens), self._block_size
        paged = PagedStep(
            cache=self._cache,
            block_size=size,
            write_slots=torch.arange(count, device=self._device) + size,
            spans=torch.tensor([[0, count, count]]),
            tables=torch.arange(1, 1 + -(-count // size), device=self._device)[None],
        )
        hidden = self._hidden(tokens, torch.arange(count, device=self._device), paged)
        error = (self.head(hidden, None).float() - expected.float()).abs().amax(-1).median()
        scale = expected.float().abs().max()
        tolerance = 1e-3 if expected.dtype == torch.float32 else 0.05
        if not error <= tolerance * scale:
            raise ModelError(
                "this model's logits differ between transformers and the engine "
                f"(by {float(error):.3g} at a scale of {float(scale):.3g}): its architecture does "
                "something the engine does not carry, or its weights are not finite"
            )


def scored_rows(rows: list[int]) -> list[list[int]]:
    """Split rows into groups small enough to hold logits for."""
    return [rows[start : start + _SCORED_ROWS] for start in range(0, len(rows), _SCORED_ROWS)]
