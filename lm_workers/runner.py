"""ModelRunner: one step of the frozen model over a batch of spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from cluster_router.wire.errors import ModelError
from lm_workers.adapters import OFF, AdaptedHead, AdapterBank, RowSlots, install
from lm_workers.attention import KV_ALIGN, PAGED, PagedStep, PrefillSpan
from lm_workers.kv_cache import KVCache
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

    Takes the model over: its linear layers are wrapped and its attention replaced.

    Args:
        model: a causal LM whose attention goes through transformers' AttentionInterface.
        cache: KV tensors.
        block_size: tokens in a block.
        bank: resident updates; None serves the base model alone.
    """

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, block_size: int, bank: AdapterBank | None
    ) -> None:
        self._device = model.device
        self._cache, self._block_size = cache, block_size
        self._rows = RowSlots()
        self.head = AdaptedHead(model.get_output_embeddings(), bank)
        reference = self._reference(model)
        if bank is not None:
            install(model, bank, self._rows)
        model.set_attn_implementation(PAGED)
        self._body = model.base_model
        self._check_same(*reference)

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepOutput:
        """Compute keys, values and final hidden states of every token in the batch."""
        spans = _never_one(batch.spans) if batch.num_tokens == 1 else batch.spans
        tokens = [token for span in spans for token in span.sequence.tokens[span.start : span.stop]]
        positions = [place for span in spans for place in range(span.start, span.stop)]
        slots = self._slots(spans)
        self._rows.tokens = slots
        hidden = self._body(
            input_ids=self._int64(tokens)[None],
            position_ids=self._int64(positions)[None],
            use_cache=False,
            paged=self._paged(spans),
        ).last_hidden_state[0]
        offsets, row = [], 0
        for span in batch.spans:
            offsets.append(row)
            row += span.length
        return StepOutput(hidden, slots, tuple(offsets))

    @torch.inference_mode()
    def logits(self, output: StepOutput, rows: list[int]) -> torch.Tensor:
        """Adapted logits [len(rows), vocab] of some of a step's rows."""
        index = self._int64(_never_one(rows))
        slots = None if output.slots is None else output.slots[index]
        return self.head(output.hidden[index], slots)[: len(rows)]

    def _int64(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _slots(self, spans: Sequence[Span]) -> torch.Tensor | None:
        slots = [span.sequence.slot or OFF for span in spans]
        if not any(slots):
            return None
        return self._int64(slots).repeat_interleave(self._int64([span.length for span in spans]))

    def _paged(self, spans: Sequence[Span]) -> PagedStep:
        placed = [(span, self._token_slots(span)) for span in spans]
        write = torch.cat([table[span.start : span.stop] for span, table in placed])
        decoding = [one for one in placed if one[0].length == 1]
        prefills, row = [], len(decoding)
        for span, table in placed[row:]:
            slots = _aligned([table])[0].to(self._device)
            prefills.append(PrefillSpan(row, row + span.length, span.stop, slots))
            row += span.length
        return PagedStep(
            cache=self._cache,
            write_slots=write.to(self._device),
            decode_slots=_aligned([table for _, table in decoding]).to(self._device),
            decode_lengths=self._int64([span.stop for span, _ in decoding]),
            prefills=tuple(prefills),
        )

    def _token_slots(self, span: Span) -> torch.Tensor:
        """Cache slots of the span's sequence, positions 0 to `span.stop`."""
        blocks = torch.tensor(span.sequence.blocks, dtype=torch.int64)
        slots = blocks[:, None] * self._block_size + torch.arange(self._block_size)
        return slots.flatten()[: span.stop]

    @torch.inference_mode()
    def _reference(self, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """A few tokens and the logits that transformers itself gives for them."""
        length = min(2 * self._block_size, self._cache.keys[0].shape[0] - self._block_size)
        tokens = torch.arange(1, length + 1, device=self._device) % model.config.vocab_size
        return tokens, model(input_ids=tokens[None], use_cache=False).logits[0]

    @torch.inference_mode()
    def _check_same(self, tokens: torch.Tensor, expected: torch.Tensor) -> None:
        """Refuse a model whose class does something that this runner leaves out.

        Examples are scaled or capped logits. Better to fail here than to serve other numbers.
        """
        count = len(tokens)
        slots = torch.arange(count, device=self._device) + self._block_size
        none = slots[:0]
        span = PrefillSpan(0, count, count, _aligned([slots.cpu()])[0].to(self._device))
        paged = PagedStep(self._cache, slots, none[:, None], none, (span,))
        positions = torch.arange(count, device=self._device)[None]
        hidden = self._body(
            input_ids=tokens[None], position_ids=positions, use_cache=False, paged=paged
        ).last_hidden_state[0]
        error = (self.head(hidden, None).float() - expected.float()).abs().max()
        scale = expected.float().abs().max()
        tolerance = 1e-3 if expected.dtype == torch.float32 else 0.05
        if not error <= tolerance * scale:
            raise ModelError(
                "this model's logits differ between transformers and the engine "
                f"(by {float(error):.3g} at a scale of {float(scale):.3g}): its architecture does "
                "something the engine does not carry, or its weights are not finite"
            )


def _never_one(rows: Sequence[T]) -> Sequence[T]:
    """Repeat a lone row.

    Matrix-vector kernels sum in another order than matrix-matrix kernels. Without them a request
    gets the same numbers, to the last bit, alone and in company.
    """
    return [*rows, *rows] if len(rows) == 1 else rows


def _aligned(tables: list[torch.Tensor]) -> torch.Tensor:
    """Stack slot tables [n_i] into [N, L], padded with slot 0 to a multiple of KV_ALIGN."""
    longest = max((len(table) for table in tables), default=0)
    padded = torch.zeros(len(tables), -(-longest // KV_ALIGN) * KV_ALIGN, dtype=torch.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return padded


def scored_rows(rows: list[int]) -> list[list[int]]:
    """Split rows into groups small enough to hold logits for."""
    return [rows[start : start + _SCORED_ROWS] for start in range(0, len(rows), _SCORED_ROWS)]
