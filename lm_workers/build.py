"""Put an engine together from a resolved model folder, a bundle's update and the settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import PretrainedConfig

from adapter_gen.update import SharedBases, UpdateSpec
from cluster_router.wire.errors import ConfigError, ModelError
from lm_workers.adapters import AdapterBank
from lm_workers.config import SLOW_STEP, STEP, EngineConfig
from lm_workers.detokenizer import TokenTexts
from lm_workers.device import pick_device, usable_cores
from lm_workers.engine import Engine, SteppedEngine
from lm_workers.graphs import choose_recorder
from lm_workers.kv_cache import BlockPool, KVCache, bytes_per_token, kv_geometry
from lm_workers.layers.choose import choose_kernels, choose_layout
from lm_workers.layers.linear import Product
from lm_workers.memory import give_back
from lm_workers.models import (
    describe_model,
    load_causal_lm,
    load_tokenizer,
    resolve_dtype,
)
from lm_workers.models.config import is_family, load_config
from lm_workers.models.family import FamilyModel, load_family
from lm_workers.models.logits import KeptLogits, TriedTexts, compute_logits, widened
from lm_workers.prefix_cache import PrefixCache
from lm_workers.runner import ModelRunner
from lm_workers.sampler import Sampler
from lm_workers.scheduler import Scheduler, StepBudget
from lm_workers.vllm.build import build_vllm_engine
from lm_workers.vllm.config import VllmConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU_CACHE_BYTES = 2**30
_GPU_FREE_SHARE = 0.8
_CPU_CHUNK, _GPU_CHUNK = 32, 512


def build_engine(
    path: Path,
    config: EngineConfig | VllmConfig,
    update: tuple[UpdateSpec, SharedBases] | None = None,
) -> SteppedEngine:
    """The engine that `config` chooses, for the model at `path`.

    Args:
        path: a folder with safetensors, config and tokenizer.
        config: the settings.
        update: form and shared parts of the updates it will be given; None serves the base alone.

    Raises:
        ModelError: the model cannot be loaded or served.
        ConfigError: the settings do not fit the model or the machine.
    """
    if isinstance(config, VllmConfig):
        return build_vllm_engine(path, config, update)
    device = pick_device(config.device)
    if device == "cpu":
        torch.set_num_threads(config.cpu_threads or usable_cores())
    dtype = resolve_dtype(config.dtype, device)
    info = describe_model(path, str(path))
    layout = choose_layout(config.linear, dtype, device)
    loaded = _load(path, info.fingerprint, dtype, device, layout)
    max_context = min(config.max_context or info.context_length, info.context_length)
    num_blocks = _num_blocks(config, loaded.model.config, dtype, device)
    pool = _pool(config, num_blocks, max_context)
    cache = KVCache(loaded.model.config, pool.num_blocks * config.block_size, dtype, device)
    bank = None if update is None else AdapterBank(*update, config.max_adapters, dtype, device)
    kernels = choose_kernels(config.kernels, dtype, device)
    budget = step_budget(config, device, dtype)
    scheduler = Scheduler(config, budget, pool, bank, _context_cost(loaded.model))
    eos = frozenset(info.eos_token_ids)
    try:
        runner = ModelRunner(
            model=loaded.model,
            tried=loaded.tried,
            cache=cache,
            block_size=config.block_size,
            bank=bank,
            layout=layout,
            kernels=kernels,
            record=choose_recorder(config.cuda_graphs, device),
        )
    except ModelError:
        if loaded.kept is not None:  # the model may be another than when they were computed
            loaded.kept.forget()
        raise
    give_back()  # loading leaves holes
    return Engine(
        runner=runner,
        scheduler=scheduler,
        sampler=Sampler(eos, kernels),
        texts=TokenTexts(load_tokenizer(path)),
        eos=eos,
        max_context=max_context,
        vocabulary=info.vocab_size,
    )


def step_budget(config: EngineConfig, device: str, dtype: torch.dtype) -> StepBudget:
    """Tokens of a step: what the settings say, or what suits the device."""
    cpu = device == "cpu"
    usual = SLOW_STEP if cpu and dtype != torch.bfloat16 else STEP
    return StepBudget(
        all=config.max_batch_tokens or usual,
        prompts=config.prefill_chunk or (_CPU_CHUNK if cpu else _GPU_CHUNK),
    )


class _Loaded(NamedTuple):
    """A model, the logits it must give, and where these are kept if they are."""

    model: FamilyModel | PreTrainedModel
    tried: TriedTexts
    kept: KeptLogits | None


def _load(
    path: Path, fingerprint: str, dtype: torch.dtype, device: str, layout: type[Product]
) -> _Loaded:
    """Load the model, and have transformers' logits for it."""
    config, narrow = load_config(path), layout.widens
    if not is_family(config):
        other = load_causal_lm(path, dtype, device)
        return _Loaded(other, compute_logits(other), None)

    def transformers_own() -> PreTrainedModel:
        if narrow:
            return widened(load_causal_lm(path, "auto", device), dtype)
        return load_causal_lm(path, dtype, device)

    kept = KeptLogits(fingerprint, config, dtype, device)
    tried = kept.get(transformers_own)
    return _Loaded(load_family(path, config, dtype, device, as_stored=narrow), tried, kept)


def _context_cost(model: FamilyModel | PreTrainedModel) -> float:
    """Multiplications of a token with one token of context, over those with the body's weights."""
    config = model.config
    layers, _, head_dim = kv_geometry(config)
    embedding = model.get_input_embeddings().weight
    matrices = [one for one in model.base_model.parameters() if one.dim() > 1]
    weights = sum(one.numel() for one in matrices if one is not embedding)
    return 2 * layers * config.num_attention_heads * head_dim / max(1, weights)


def _pool(config: EngineConfig, num_blocks: int, max_context: int) -> BlockPool:
    """Blocks for at least one context."""
    prefixes = PrefixCache() if config.prefix_cache else None
    pool = BlockPool(num_blocks, config.block_size, prefixes)
    if pool.capacity < max_context:
        raise ConfigError(
            f"kv_cache_tokens holds {pool.capacity} tokens, less than one context of "
            f"{max_context}; raise kv_cache_tokens or lower max_context",
            "kv_cache_tokens",
        )
    return pool


def _num_blocks(
    config: EngineConfig, model: PretrainedConfig, dtype: torch.dtype, device: str
) -> int:
    tokens = config.kv_cache_tokens
    if tokens is None:
        room = _CPU_CACHE_BYTES
        if device.startswith("cuda"):
            room = int(torch.cuda.mem_get_info(device)[0] * _GPU_FREE_SHARE)
        tokens = room // bytes_per_token(model, dtype)
    return 1 + tokens // config.block_size
