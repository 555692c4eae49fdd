"""vLLM's engine, in one process, called step by step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

# Read when vllm is imported: the engine core in this process, so that its memory is this one's.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm
from serving_bench.clients import Arrival, drive
from serving_bench.workload import Request, Trace, Workload
from vllm.lora.request import LoRARequest

MAX_LORAS = 16


class VllmEngine:
    """An LLMEngine; with LoRA where there are adapters."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.version = f"vllm {vllm.__version__}"
        self._adapters: str | None = job["adapters"]
        lora: dict[str, Any] = {}
        if self._adapters is not None:
            count = len(os.listdir(self._adapters))  # noqa: PTH208
            lora = {
                "enable_lora": True,
                "max_loras": min(MAX_LORAS, count),
                "max_cpu_loras": count,
                "max_lora_rank": job["adapter_rank"],
            }
        self._engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(
                model=job["model"],
                dtype=job["dtype"],
                max_model_len=job["max_context"],
                max_num_seqs=job["max_concurrency"],
                **lora,
            )
        )

    def prepare(self, load: Workload) -> None:
        """Read the adapters that `load` uses."""
        for cluster in {one.cluster for one in load.requests} - {None}:
            assert cluster is not None
            self._engine.add_lora(self._lora(cluster))

    def add(self, index: int, request: Request, output_tokens: int) -> None:
        """See SteppedEngine."""
        params = vllm.SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        params.output_kind = vllm.sampling_params.RequestOutputKind.DELTA
        lora = None if request.cluster is None else self._lora(request.cluster)
        prompt = {"prompt_token_ids": request.prompt}
        self._engine.add_request(str(index), prompt, params, lora_request=lora)

    def step(self) -> Iterator[Arrival]:
        """See SteppedEngine."""
        for output in self._engine.step():
            tokens = tuple(output.outputs[0].token_ids)
            yield Arrival(int(output.request_id), tokens, output.finished)

    def run(self, load: Workload) -> list[Trace]:
        """See HostedEngine."""
        return drive(self, load)

    def close(self) -> None:
        """Nothing is left running."""

    def _lora(self, cluster: int) -> LoRARequest:
        name = f"{cluster:04}"
        return LoRARequest(name, cluster + 1, f"{self._adapters}/{name}")


start = VllmEngine
