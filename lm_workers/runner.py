"""ModelRunner: one step of the frozen model over a batch of spans."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import torch

from cluster_router.wire.errors import ModelError
from lm_workers.adapters import AdapterBank, RowSlots
from lm_workers.graphs import Decoded, DecodeGraphs, Recorder
from lm_workers.inputs import InputBuilder, StepInputs
from lm_workers.kv_cache import KVCache
from lm_workers.layers.head import AdaptedHead
from lm_workers.layers.install import install
from lm_workers.layers.kernels import Kernels
from lm_workers.layers.linear import Product
from lm_workers.models.family import FamilyModel
from lm_workers.models.logits import TriedTexts
from lm_workers.models.rope import check_rope
from lm_workers.sequence import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_SCORED_ROWS = 256
"""Prompt positions whose logits exist at one time; bounds memory when a long text is scored."""

_ELSE = "serve it with vLLM (`engine: {backend: vllm}`), or another model"


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step leaves behind.

    Attributes:
        hidden: [T, d], final hidden states of every token of the batch.
        slots: int64 [T] adapter slots of the tokens, None when no token is adapted.
        offsets: row at which each span starts.
        logits: adapted logits [T, vocab] of all of them, where the step came with them.
    """

    hidden: torch.Tensor
    slots: torch.Tensor | None
    offsets: tuple[int, ...]
    logits: torch.Tensor | None = None


class ModelRunner:
    """Runs batches through a model, with the KV cache and the updates.

    Takes the model over: its layers are replaced by ours, one after the other, and each gives its
    memory back. It computes in the dtype of the cache.

    Args:
        model: of the family, whose matrices may be in another dtype where `layout` widens them; or
            a causal LM whose attention goes through transformers' AttentionInterface.
        tried: texts of which it must first give the same logits as transformers.
        cache: KV tensors.
        block_size: tokens in a block.
        bank: resident updates; None serves the base model alone.
        layout: of the weights.
        kernels: compute what is not a matrix product.
        record: makes decoding steps repeatable; None computes each anew.
    """

    def __init__(
        self,
        model: FamilyModel | PreTrainedModel,
        tried: TriedTexts,
        cache: KVCache,
        block_size: int,
        bank: AdapterBank | None,
        layout: type[Product],
        kernels: Kernels,
        record: Recorder | None = None,
    ) -> None:
        self._rows, self._min_rows = RowSlots(), layout.min_rows
        # Torch's operations find the device of their tensors; Triton's kernels run on the thread's.
        self._device = torch.cuda.device(model.device) if model.device.type == "cuda" else None
        self._inputs = InputBuilder(cache, block_size, model.device)
        lm_head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.head = AdaptedHead(lm_head, layout, kernels, bank)
        # The head's layout can stand for the embedding's copy of the weight that they share.
        shared = self.head.rows if lm_head.weight is embedding.weight else None
        dtype = cache.keys[0].dtype
        self._body = install(model, layout, kernels, bank, self._rows, dtype, shared)
        if bank is not None:
            bank.forget_bases()
        self._config = model.config
        with self._device or nullcontext():
            self._check_same(tried, cache, block_size, layout.rounding)
        self._graphs: DecodeGraphs | None = None
        if record is not None:
            self._graphs = DecodeGraphs(
                self._decoded, record, cache, block_size, self._min_rows, kernels.most_context
            )

    def check_context(self, max_context: int) -> None:
        """Refuse a longest text with which steps would not do; see `check_rope`."""
        check_rope(self._config, max_context)

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepOutput:
        """Compute keys, values and final hidden states of every token in the batch."""
        with self._device or nullcontext():
            decoded, slots = self._repeated(batch) or self._computed(batch)
        offsets = accumulate((span.length for span in batch.spans[:-1]), initial=0)
        return StepOutput(decoded.hidden, slots, tuple(offsets), decoded.logits)

    @torch.inference_mode()
    def logits(self, output: StepOutput, rows: list[int]) -> torch.Tensor:
        """Adapted logits [len(rows), vocab] of some of a step's rows."""
        if output.logits is not None and rows == list(range(len(output.logits))):
            return output.logits
        index = self._inputs.int64(self._enough(rows))
        slots = None if output.slots is None else output.slots[index]
        with self._device or nullcontext():
            return self.head(output.hidden[index], slots)[: len(rows)]

    def _repeated(self, batch: Batch) -> tuple[Decoded, torch.Tensor | None] | None:
        if self._graphs is None or not batch.only_decodes:
            return None
        return self._graphs.run(batch.spans)

    def _computed(self, batch: Batch) -> tuple[Decoded, torch.Tensor | None]:
        spans = self._enough(batch.spans) if batch.num_tokens == 1 else batch.spans
        inputs = self._inputs.build(spans)
        return Decoded(self._hidden(inputs), None), inputs.slots

    def _decoded(self, inputs: StepInputs) -> Decoded:
        """A step of rows that all want logits; nothing in it waits for the device."""
        hidden = self._hidden(inputs)
        logits = None if self.head.waits else self.head(hidden, inputs.slots)
        return Decoded(hidden, logits)

    def _hidden(self, inputs: StepInputs) -> torch.Tensor:
        """Final hidden states [T, d]."""
        self._rows.tokens = inputs.slots
        return self._body(inputs.tokens, inputs.positions, inputs.paged)

    def _enough(self, rows: Sequence[T]) -> Sequence[T]:
        """Repeat a lone row where it would be summed in another order than rows in company."""
        return [*rows] * self._min_rows if len(rows) == 1 else rows

    @torch.inference_mode()
    def _check_same(
        self, tried: TriedTexts, cache: KVCache, block_size: int, rounding: float
    ) -> None:
        """Refuse a model whose class does something that this runner leaves out.

        Examples are scaled or capped logits, and layers that take from the tokens before something
        other than keys and values: these get the last tokens wrong, which are computed in a step of
        their own. Better to fail here than to serve other numbers. The median position of a step
        counts: in half precision single ones swing with the order of a sum.
        """
        blocks = len(cache.keys[0]) // block_size - 1  # less the one that is nobody's
        length = min(tried.tokens.shape[1], blocks * block_size)
        count = min(len(tried.tokens), blocks // -(-length // block_size))
        tokens, expected = tried.tokens[:count, :length], tried.logits[:count, :length]
        scale = float(expected.abs().max())
        for start, stop in pairwise(sorted({0, length - 1, length})):
            places = torch.arange(start, stop, device=tokens.device).repeat(count)
            paged = self._inputs.alike(count, start, stop, -(-length // block_size))
            given = StepInputs(tokens[:, start:stop].flatten(), places, None, paged)
            try:
                logits = self.head(self._hidden(given), None)
            except (AttributeError, TypeError) as cause:
                raise ModelError(f"the engine cannot run this model ({cause}); {_ELSE}") from cause
            difference = logits.float() - expected[:, start:stop].flatten(0, 1).float()
            error = float(difference.abs().amax(-1).median())
            tolerance = 1e-3 if logits.dtype == torch.float32 else 0.05
            if not error <= (tolerance + rounding) * scale:
                raise ModelError(
                    "this model's logits differ between transformers and the engine, which "
                    "computes many texts at a time and each in parts "
                    f"(by {error:.3g} at a scale of {scale:.3g}): its architecture does something "
                    f"the engine does not carry, or its weights are not finite; {_ELSE}"
                )


def scored_rows(rows: list[int]) -> list[list[int]]:
    """Split rows into groups small enough to hold logits for."""
    return [rows[start : start + _SCORED_ROWS] for start in range(0, len(rows), _SCORED_ROWS)]
