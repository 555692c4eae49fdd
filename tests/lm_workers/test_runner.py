"""A step's numbers do not depend on how the work was cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from traffic_cases import update_of

from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.layers.decoder import DecoderLayer

PROMPT = tuple(2 + 7 * number % 300 for number in range(61))


def scores(path: Path, dtype: str, step_tokens: int) -> list[float | None]:
    """Log-probabilities of a prompt computed `step_tokens` at a time, and of four tokens more."""
    config = EngineConfig.model_validate(
        {
            "device": "cpu",
            "dtype": dtype,
            "kernels": "native",  # torch's attention rounds differently in chunks
            "max_sequences": 2,
            "max_batch_tokens": step_tokens,
            "block_size": 4,
            "cpu_threads": 1,
        }
    )
    engine = build_engine(path, config)
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=0, prompt_logprobs=0)
    engine.add(TokenizedRequest("r", PROMPT, sampling, Assignment(key=None)), None)
    found: list[float | None] = []
    while engine.has_work:
        for chunk in engine.step():
            found += [one.logprob for one in (*(chunk.prompt_logprobs or ()), *chunk.logprobs)]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_change_no_bit(cxx: str, tiny_llama: Path, dtype: str) -> None:
    whole = scores(tiny_llama, dtype, 64)
    assert len(whole) == len(PROMPT) + 4
    assert scores(tiny_llama, dtype, 23) == whole
    assert scores(tiny_llama, dtype, 7) == whole


def test_layers_of_known_families_are_replaced_and_others_are_not(
    tiny_checkpoints: dict[str, Path],
) -> None:
    config = EngineConfig(dtype="float32", cpu_threads=1)
    for family, ours in {"llama": True, "qwen3": True, "gpt2": False}.items():
        engine = build_engine(tiny_checkpoints[family], config)
        layers = [one for one in engine._runner._body.modules() if isinstance(one, DecoderLayer)]
        assert len(layers) == (2 if ours else 0)


def test_packed_weights_replace_the_plain_ones(tiny_llama: Path) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 in oneDNN here")
    engine = build_engine(tiny_llama, EngineConfig(dtype="bfloat16", cpu_threads=1))
    parameters = engine._runner._body.named_parameters()
    # Tokens are looked up in the embedding, unless its weight can be read from the head's layout.
    kept = [] if engine._runner.head.rows else ["embedding.weight"]
    assert [name for name, one in parameters if one.dim() == 2] == kept


def test_what_all_updates_share_is_held_once(tiny_llama: Path) -> None:
    spec, bases, _ = update_of(tiny_llama)
    engine = build_engine(tiny_llama, EngineConfig(dtype="float32", cpu_threads=1), (spec, bases))
    bank = engine._scheduler._bank
    assert bank.u == bank.v == []
