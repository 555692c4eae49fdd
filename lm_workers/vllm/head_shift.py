"""The shift of the final hidden state, which LoRA cannot carry, as a logits processor of vLLM.

A shift s adds the same vector W s to the logits at every position. vLLM loads this class by name,
in whichever process computes the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cachetools import LRUCache
from safetensors.torch import load_file
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from lm_workers.vllm.adapters import ARGUMENT, TENSOR

NAME = f"{__name__}:HeadShift"
"""By which vLLM loads it."""

_KEPT = 256


@dataclass(frozen=True, eq=False)
class _Shift:
    """W s, float32 [vocab]. (Wrapped, since vLLM asks for the truth of what a row holds.)"""

    logits: torch.Tensor


class HeadShift(LogitsProcessor):
    """Adds to each row of a batch what its request's update adds to every position's logits."""

    def __init__(self, _: VllmConfig, device: torch.device, __: bool) -> None:
        self._device = device
        self._rows: dict[int, _Shift] = {}
        self._shifts: LRUCache[str, _Shift] = LRUCache(_KEPT)

    def is_argmax_invariant(self) -> bool:
        """It is not: greedy answers change too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows of the batch."""
        process_dict_updates(self._rows, batch_update, self._of)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits float32 [rows, vocab], which change in place."""
        for row, shift in self._rows.items():
            logits[row, : len(shift.logits)] += shift.logits
        return logits

    def _of(self, params: SamplingParams, _: list[int] | None, __: list[int]) -> _Shift | None:
        path = (params.extra_args or {}).get(ARGUMENT)
        if path is None:
            return None
        if path not in self._shifts:
            self._shifts[path] = _Shift(load_file(path)[TENSOR].to(self._device))
        return self._shifts[path]
