"""transformers' `generate` on static batches, padded on the left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from serving_bench.workload import Request, Trace, Workload
from transformers.generation import BaseStreamer


class Clock(BaseStreamer):
    """Notes when each step's tokens come; the first `put` is the prompt."""

    def __init__(self, began: float) -> None:
        self._began = began
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """One token for each row."""
        self.times.append(time.perf_counter() - self._began)

    def end(self) -> None:
        """The batch has ended."""


class TransformersEngine:
    """A batch at a time: the next begins when the last has ended."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.version = f"transformers {transformers.__version__}"
        self._device = job["device"]
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=getattr(torch, job["dtype"])
        )
        self.model = model.to(self._device).eval()
        # Answers run to their full length.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def prepare(self, load: Workload) -> None:
        """Nothing is kept between runs."""

    def run(self, load: Workload) -> list[Trace]:
        """See HostedEngine."""
        began = time.perf_counter()
        traces: list[Trace] = []
        for first in range(0, len(load.requests), load.concurrency):
            batch = load.requests[first : first + load.concurrency]
            sent, clock = time.perf_counter() - began, Clock(began)
            answers = self._generate(batch, load.output_tokens, clock)
            times = clock.times[1:]
            traces += [Trace(sent, times, len(answer), tuple(answer)) for answer in answers]
        return traces

    def close(self) -> None:
        """Nothing is left running."""

    def generate_options(self, batch: Sequence[Request]) -> dict[str, Any]:
        """What `generate` is told beside the prompts."""
        return {}

    @torch.inference_mode()
    def _generate(
        self, batch: Sequence[Request], output_tokens: int, clock: Clock
    ) -> list[list[int]]:
        longest = max(len(one.prompt) for one in batch)
        pads = [longest - len(one.prompt) for one in batch]
        ids = [[0] * pad + one.prompt for pad, one in zip(pads, batch, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        found = self.model.generate(
            input_ids=torch.tensor(ids, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            max_new_tokens=output_tokens,
            do_sample=False,
            streamer=clock,
            **self.generate_options(batch),
        )
        answers: list[list[int]] = found[:, longest:].tolist()
        return answers


start = TransformersEngine
