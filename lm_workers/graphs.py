"""Decoding steps that are recorded once for each size and then repeated: CUDA graphs.

A step that decodes a few rows is hundreds of small kernels, and a GPU runs them faster than Python
starts them. Recorded once, they are started as one. A recorded step runs over the same memory every
time, so sizes are rounded up to a `Bucket` and inputs are copied to where it reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from lm_workers.adapters import OFF
from lm_workers.inputs import StepInputs
from lm_workers.kv_cache import KVCache
from lm_workers.layers.paged import PagedStep
from lm_workers.sequence import Span

log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """What a decoding step computes.

    Attributes:
        hidden: final hidden states [T, d].
        logits: [T, vocab], adapted; None where they cannot be recorded.
    """

    hidden: torch.Tensor
    logits: torch.Tensor | None

    def first(self, count: int) -> Decoded:
        """Those of the first rows."""
        logits = None if self.logits is None else self.logits[:count]
        return Decoded(self.hidden[:count], logits)


Repeat = Callable[[], Decoded]
"""Computes again, from what its inputs hold by now, and returns the same tensors every time."""

Recorder = Callable[[Repeat], Repeat]
"""Records a computation. That may run it, more than once. RuntimeError where it cannot."""

_SMALLEST_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of a recorded step; it serves all that are no larger.

    Attributes:
        rows: sequences that get a token.
        blocks: KV blocks of each.
        adapted: whether updates are applied.
    """

    rows: int
    blocks: int
    adapted: bool


def choose_bucket(spans: Sequence[Span], block_size: int, min_rows: int) -> Bucket:
    """The smallest bucket that these spans of one token fit in."""
    blocks = max(-(-span.stop // block_size) for span in spans)
    return Bucket(
        rows=_power_of_two(max(len(spans), min_rows)),
        blocks=_power_of_two(max(blocks, -(-_SMALLEST_CONTEXT // block_size))),
        adapted=any(span.sequence.slot or OFF for span in spans),
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


class DecodeInputs:
    """Memory that a recorded step reads.

    One int64 matrix, so that a step is one copy. Its rows: tokens, positions, cache slots to write,
    lengths, adapter slots, and then the blocks; its columns: the bucket's rows. A column without a
    sequence is a sequence of one token in block 0, which belongs to nobody, unadapted.
    """

    def __init__(self, bucket: Bucket, cache: KVCache, block_size: int) -> None:
        self._bucket, self._cache, self._block_size = bucket, cache, block_size
        shape = (5 + bucket.blocks, bucket.rows)
        self._matrix = torch.zeros(shape, dtype=torch.int64, device=cache.keys[0].device)

    @property
    def slots(self) -> torch.Tensor | None:
        """Adapter slots [rows]; None when no row is adapted."""
        return self._matrix[4] if self._bucket.adapted else None

    def fill(self, spans: Sequence[Span]) -> None:
        """Put the next step's numbers there."""
        size = self._block_size
        matrix = np.zeros(tuple(self._matrix.shape), np.int64)
        matrix[3] = 1
        for column, span in enumerate(spans):
            one, place = span.sequence, span.start
            write = one.blocks[place // size] * size + place % size
            matrix[:5, column] = one.tokens[place], place, write, span.stop, one.slot or OFF
            blocks = one.blocks[: place // size + 1]
            matrix[5 : 5 + len(blocks), column] = blocks
        self._matrix.copy_(torch.from_numpy(matrix))

    def view(self) -> StepInputs:
        """The inputs, as views of the memory.

        New ones each time: what a step derives from them must be computed while it is recorded.
        """
        rows = torch.arange(self._bucket.rows)
        most = torch.full_like(rows, self._bucket.blocks * self._block_size)
        paged = PagedStep(
            cache=self._cache,
            block_size=self._block_size,
            write_slots=self._matrix[2],
            spans=torch.stack([rows, rows + 1, most], 1),
            lengths=self._matrix[3],
            tables=self._matrix[5:].T,
        )
        return StepInputs(self._matrix[0], self._matrix[1], self.slots, paged)


class DecodeGraphs:
    """Runs steps in which every sequence gets one token.

    Each bucket is recorded when it is first needed. Where that fails no more is recorded or
    repeated, the log says why, and the caller computes as usual.

    Args:
        compute: a step. Its kernels must take the lengths of sequences from `PagedStep.lengths`,
            and never wait for the device.
        record: makes a computation repeatable.
        cache: KV tensors.
        block_size: tokens in a block.
        min_rows: fewest rows to compute at a time.
        most_context: see `Kernels`; a step that reads more is not recorded.
    """

    def __init__(
        self,
        compute: Callable[[StepInputs], Decoded],
        record: Recorder,
        cache: KVCache,
        block_size: int,
        min_rows: int,
        most_context: int | None,
    ) -> None:
        self._compute, self._record = compute, record
        self._cache, self._block_size, self._min_rows = cache, block_size, min_rows
        self._most_context = most_context
        self._recorded: dict[Bucket, tuple[DecodeInputs, Repeat]] = {}
        self._works = True

    def run(self, spans: Sequence[Span]) -> tuple[Decoded, torch.Tensor | None] | None:
        """What N spans of one token give, and their adapter slots [N].

        They hold until the next call. None where this step is not for graphs.
        """
        bucket = choose_bucket(spans, self._block_size, self._min_rows)
        context, most = bucket.rows * bucket.blocks * self._block_size, self._most_context
        if not self._works or (most is not None and context > most):
            return None
        if bucket in self._recorded:
            inputs, repeat = self._recorded[bucket]
            inputs.fill(spans)
        else:
            inputs = DecodeInputs(bucket, self._cache, self._block_size)
            inputs.fill(spans)
            try:
                repeat = self._record(lambda: self._compute(inputs.view()))
            except RuntimeError as error:
                log.warning("decoding without CUDA graphs, more slowly: %s", error)
                self._works = False
                return None
            self._recorded[bucket] = inputs, repeat
        count = len(spans)
        return repeat().first(count), None if inputs.slots is None else inputs.slots[:count]


class CudaRecorder:
    """Records CUDA graphs; see `Recorder`. They share one memory pool: one runs at a time.

    Args:
        device: that the computations run on.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)

    def __call__(self, compute: Repeat) -> Repeat:
        """Run `compute` as a rehearsal, which allocates what libraries keep, and record it."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                compute()
            current.wait_stream(self._stream)
            return self._record(compute, current)

    def _record(self, compute: Repeat, current: torch.cuda.Stream) -> Repeat:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may go on using the device.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = compute()
        finally:
            torch.cuda.set_stream(current)  # one that fails does not go back to it

        def repeat() -> Decoded:
            graph.replay()
            return result

        return repeat


def choose_recorder(wanted: bool, device: str) -> Recorder | None:
    """What records steps on `device`; None where each is computed anew."""
    return CudaRecorder(device) if wanted and device.startswith("cuda") else None
