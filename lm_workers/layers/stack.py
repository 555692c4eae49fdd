"""All decoder layers of a model as one: a small step like one before is played from its tape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from lm_workers.adapters import RowSlots
from lm_workers.layers.decoder import DecoderLayer
from lm_workers.layers.paged import PagedStep
from lm_workers.layers.tape import Memory, Tape

_MOST_TAPES = 128
_MOST_ROWS = 64
"""Of a step that is worth a tape: in one of more, Python's part is small."""
_FEWEST_BLOCKS = 16

Rotary = tuple[torch.Tensor, torch.Tensor]


class Shape(NamedTuple):
    """What must be alike for one step to be another's again.

    Attributes:
        rows: tokens.
        spans: sequences that they are of.
        blocks: room for those of each sequence.
        adapted: whether updates are applied.
    """

    rows: int
    spans: int
    blocks: int
    adapted: bool


class DecoderStack(nn.Module):
    """Takes the place of all layers of a transformers model.

    Args:
        layers: in their order.
        rows: the step's adapter slots, which the layers read.
        taped: whether a tape notes all that the layers do.
    """

    def __init__(self, layers: Sequence[DecoderLayer], rows: RowSlots, taped: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._rows, self._taped = rows, taped
        self._steps: OrderedDict[Shape, TapedStep] = OrderedDict()
        self._memory, self._large = Memory(_MOST_ROWS), Memory(0)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: Rotary,
        paged: PagedStep,
        **_: object,
    ) -> torch.Tensor:
        """hidden_states [1, T, d] -> [1, T, d]; it holds until the next step.

        Args:
            position_embeddings: cosines and sines, each [1, T, head_dim].
            paged: the step.
        """
        rows, slots = hidden_states.shape[1], self._rows.tokens
        if not self._taped:
            return run_layers(self.layers, hidden_states, position_embeddings, paged)
        if rows > _MOST_ROWS:
            return self._computed(hidden_states, position_embeddings, paged)
        shape = _shape(rows, paged, slots)
        if shape in self._steps:
            self._steps.move_to_end(shape)
            step = self._steps[shape]
            step.fill(hidden_states, position_embeddings, paged, slots)
            step.tape.play()
            return step.hidden
        tape = Tape(self._memory)
        step = TapedStep(tape, shape, hidden_states, position_embeddings, paged, slots)
        self._rows.tokens = step.slots
        try:
            step.record(self.layers)
        finally:
            self._rows.tokens = slots
        self._steps[shape] = step
        if len(self._steps) > _MOST_TAPES:
            self._steps.popitem(last=False)
        return step.hidden

    def _computed(self, hidden: torch.Tensor, rotary: Rotary, paged: PagedStep) -> torch.Tensor:
        """A large step; it keeps no tape, but the memory: asked for anew it may be fresh pages."""
        if hidden.shape[1] > self._large.rows:
            self._large = Memory(hidden.shape[1])
        record(Tape(self._large), self.layers, hidden, rotary, paged)
        return hidden


class TapedStep:
    """A tape, and the memory that its calls read.

    Attributes:
        tape: of the layers.
        hidden: [1, T, d], what goes in, and after it comes out.
        slots: int64 [T], None where no update is applied.
    """

    def __init__(
        self,
        tape: Tape,
        shape: Shape,
        hidden: torch.Tensor,
        rotary: Rotary,
        paged: PagedStep,
        slots: torch.Tensor | None,
    ) -> None:
        self.tape = tape
        self.hidden = _like(hidden)
        self.slots = None if slots is None else _like(slots)
        self._rotary = _like(rotary[0]), _like(rotary[1])
        self._paged = replace(
            paged,
            write_slots=_like(paged.write_slots),
            spans=_like(paged.spans),
            lengths=_like(paged.lengths),
            tables=torch.zeros(shape.spans, shape.blocks, dtype=torch.int64),
        )
        self.fill(hidden, rotary, paged, slots)

    def fill(
        self, hidden: torch.Tensor, rotary: Rotary, paged: PagedStep, slots: torch.Tensor | None
    ) -> None:
        """Put the next step's numbers there."""
        own = self._paged
        self.hidden.copy_(hidden)
        self._rotary[0].copy_(rotary[0])
        self._rotary[1].copy_(rotary[1])
        own.write_slots.copy_(paged.write_slots)
        own.spans.copy_(paged.spans)
        own.lengths.copy_(paged.lengths)
        own.tables[:, : paged.tables.shape[1]].copy_(paged.tables)
        if self.slots is not None and slots is not None:
            self.slots.copy_(slots)

    def record(self, layers: nn.ModuleList) -> None:
        """Compute the step, noting how."""
        record(self.tape, layers, self.hidden, self._rotary, self._paged)


def record(
    tape: Tape, layers: nn.ModuleList, hidden: torch.Tensor, rotary: Rotary, paged: PagedStep
) -> None:
    """Compute a step in the memory of a tape, which notes how; hidden changes in place."""
    with tape.recording():
        for layer in layers:
            tape.rewind()
            run_layers([layer], hidden, rotary, paged)


def run_layers(
    layers: Sequence[nn.Module] | nn.ModuleList,
    hidden: torch.Tensor,
    rotary: Rotary,
    paged: PagedStep,
) -> torch.Tensor:
    """One after the other; hidden [1, T, d] changes in place."""
    for (
        layer
    ) in layers:  # past torch's way to call a module, which takes longer than small products
        hidden = layer.forward(hidden, position_embeddings=rotary, paged=paged)
    return hidden


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _shape(rows: int, paged: PagedStep, slots: torch.Tensor | None) -> Shape:
    spans, blocks = paged.tables.shape
    room = max(_FEWEST_BLOCKS, 1 << (blocks - 1).bit_length())
    return Shape(rows, spans, room, slots is not None)
