"""Settings of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
LayoutName = Literal["auto", "plain", "packed", "int8"]
KernelsName = Literal["auto", "reference", "native"]

STEP, SLOW_STEP = 1024, 512
"""Tokens of a step where nobody has said how many; the second on a CPU but in bfloat16."""


class EngineConfig(BaseModel):
    """How one LM replica runs.

    Attributes:
        backend: chooses this engine, the built-in one; the other is lm_workers/vllm.
        device: `auto` takes CUDA where there is one.
        dtype: `auto` is bfloat16 where the device computes in it natively, else float32.
        max_sequences: requests that run at the same time; more wait in their cluster's queue.
        max_batch_tokens: tokens in one step, and so of the prompts that are read together while no
            stream is running. None is 1,024, and 512 on a CPU that is not to compute in bfloat16,
            which more would keep for seconds.
        prefill_chunk: prompt tokens in one step while streams are running; those far into a prompt
            count for more. Bounds how long a prompt can hold streams up. None is 32 on a CPU, where
            more was not faster, and 512 on a GPU, where it was not measured.
        max_context: longest prompt plus output; None is the model's own limit.
        block_size: tokens in one block of the KV cache.
        kv_cache_tokens: size of the KV cache; None is 1 GiB worth on a CPU, whose memory is taken
            as the cache fills, and four fifths of the memory left on a GPU.
        prefix_cache: keep the keys and values of finished texts for texts that begin alike.
        max_adapters: updates resident on the device; the least recently used makes room.
        max_wait_s: a request that has waited this long goes before every warm cluster.
        max_queued: requests waiting before new ones are refused.
        linear: layout of the weights. `packed` is laid out for this CPU's kernels: our own for
            float32, and for bfloat16 where it has AMX or AVX-512 BF16, else oneDNN's; `auto` takes
            it wherever it is possible. `int8` keeps weights in 8 bits and multiplies in 8 bits,
            on CPUs with AVX-512 VNNI: faster and smaller, but not the same numbers.
        kernels: what computes the rest of a layer. `native` is compiled, C++ on a CPU and Triton on
            a GPU; `auto` falls back to `reference`, plain torch, where there is no compiler.
        cuda_graphs: on a GPU, record decoding steps of each size and repeat them, which saves the
            time that Python takes to start their kernels; where that fails the log says why.
        cpu_threads: threads of one step on a CPU; None is every core this process may use, or as
            many as the CPU quota of its container pays for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["built-in"] = "built-in"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_sequences: PositiveInt = 32
    max_batch_tokens: PositiveInt | None = None
    prefill_chunk: PositiveInt | None = None
    max_context: PositiveInt | None = None
    block_size: PositiveInt = 16
    kv_cache_tokens: PositiveInt | None = None
    prefix_cache: bool = True
    max_adapters: PositiveInt = 64
    max_wait_s: Annotated[float, Field(ge=0)] = 0.5
    max_queued: PositiveInt = 256
    linear: LayoutName = "auto"
    kernels: KernelsName = "auto"
    cuda_graphs: bool = True
    cpu_threads: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_device(cls, settings: Any) -> Any:
        if isinstance(settings, Mapping) and "tensor_parallel" in settings:
            raise ValueError(
                "tensor_parallel: the built-in engine runs a model on one device; set "
                "backend: vllm to split it over several"
            )
        return settings

    @model_validator(mode="after")
    def _every_running_sequence_fits_in_a_step(self) -> EngineConfig:
        tokens = self.max_batch_tokens or SLOW_STEP
        if tokens < self.max_sequences:
            raise ValueError(
                f"max_batch_tokens ({tokens}) must be at least max_sequences "
                f"({self.max_sequences}), so that every running stream gets a token in each step"
            )
        return self
