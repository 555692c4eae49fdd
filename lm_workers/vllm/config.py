"""Settings of the vLLM engine. Importing this does not import vLLM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]

_SET_HERE = {
    "dtype": "dtype",
    "enable_lora": "max_adapters",
    "enable_prefix_caching": "prefix_cache",
    "max_cpu_loras": "max_adapters",
    "max_loras": "max_adapters",
    "max_model_len": "max_context",
    "max_num_seqs": "max_sequences",
    "tensor_parallel_size": "tensor_parallel",
}
_OURS = (
    "logits_processors",
    "logprobs_mode",
    "max_logprobs",
    "max_lora_rank",
    "model",
    "skip_tokenizer_init",
    "tokenizer",
    "trust_remote_code",
)


def _free(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if name in _SET_HERE:
            raise ValueError(f"{name} is the setting `{_SET_HERE[name]}` beside `options`")
        if name in _OURS:
            raise ValueError(f"{name} is not free: it follows from the model and the bundle")
    return options


class VllmConfig(BaseModel):
    """How one LM replica runs vLLM.

    Attributes:
        backend: chooses this engine.
        dtype: `auto` is bfloat16 where the device computes in it natively, else float32; for
            quantised weights what vLLM takes for them.
        max_sequences: requests that run at the same time.
        max_context: longest prompt plus output; None is the model's own limit.
        prefix_cache: keep the keys and values of finished texts for texts that begin alike.
        max_adapters: updates resident on the device, and most that one step can mix; a request of
            a further one waits. Each takes as much memory as a whole LoRA adapter.
        max_queued: requests waiting before new ones are refused.
        tensor_parallel: GPUs that every layer is split over, all of one machine. With more than one
            a replica asks Ray for so many.
        options: any other arguments of vLLM's engine by its own names (`vllm.EngineArgs`), such as
            `quantization`, `speculative_config`, `enforce_eager`, `kv_cache_memory_bytes`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["vllm"] = "vllm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_sequences: PositiveInt = 32
    max_context: PositiveInt | None = None
    prefix_cache: bool = True
    max_adapters: PositiveInt = 8
    max_queued: PositiveInt = 256
    tensor_parallel: PositiveInt = 1
    options: Annotated[dict[str, Any], AfterValidator(_free)] = {}

    @property
    def devices(self) -> int:
        """Devices that one replica computes on."""
        return self.tensor_parallel * int(self.options.get("pipeline_parallel_size", 1))
