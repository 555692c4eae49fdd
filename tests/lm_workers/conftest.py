from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from lm_workers.layers.compiler import CompileError, _find_compiler


@pytest.fixture
def cxx() -> str:
    """The C++ compiler; skips where there is none. Sources that it refuses are no such reason."""
    try:
        return _find_compiler()
    except CompileError as error:
        pytest.skip(str(error))


@pytest.fixture
def save_drawn(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[[PretrainedConfig, Callable[[torch.nn.Parameter], object]], Path]:
    """Save a float32 model of a config, whose weights a function has drawn."""

    def saved(config: PretrainedConfig, draw: Callable[[torch.nn.Parameter], object]) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            draw(parameter)
        model.save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return saved
