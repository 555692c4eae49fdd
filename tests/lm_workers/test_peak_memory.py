"""What an engine takes beside the libraries: the weights as they are stored, and what it caches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm_workers.layers.choose import choose_layout
from lm_workers.layers.panels import PairProduct, PanelProduct, TileProduct
from lm_workers.models import load_causal_lm, load_copied
from lm_workers.models.info import load_config
from lm_workers.models.load import DTYPES

PROGRAM = """
import pathlib, sys
from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import load_tokenizer

def memory(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(name + ":")[2].split()[0])

path = pathlib.Path(sys.argv[1])
load_tokenizer(path)
libraries = memory("VmRSS")
engine = build_engine(path, EngineConfig(dtype=sys.argv[2], device="cpu", cpu_threads=1))
sampling = SamplingParams(max_tokens=2, temperature=0)
for number in range(4):
    prompt = tuple(range(100 + number, 132 + number))
    engine.add(TokenizedRequest(str(number), prompt, sampling, Assignment(key=None)), None)
while engine.has_work:
    engine.step()
print(memory("VmHWM") - libraries, memory("VmRSS") - libraries)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_takes_little_more_than_the_stored_weights(
    cxx: str, default_model: Path, dtype: str
) -> None:
    layout = choose_layout("auto", DTYPES[dtype], "cpu")
    if layout not in (PanelProduct, PairProduct, TileProduct):
        pytest.skip(f"this CPU does not compute in {dtype}, or torch does it for it")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(default_model), dtype],
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    stored = (default_model / "model.safetensors").stat().st_size
    peak, after = map(int, done.stdout.split())
    # Beside the weights: the embedding once more, a matrix on its way, activations, allocators.
    assert peak < 1.6 * stored
    # The embedding is the head's panels then.
    assert after < 1.35 * stored


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_as_stored_is_the_same_model_in_the_dtype_of_its_files(
    tiny_checkpoints: dict[str, Path], tmp_path: Path, family: str, stored: torch.dtype
) -> None:
    whole = load_causal_lm(tiny_checkpoints[family], torch.float32, "cpu")
    whole.to(stored).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(
        (tiny_checkpoints[family] / "tokenizer.json").read_bytes()
    )
    expected = load_causal_lm(tmp_path, torch.float32, "cpu")
    found = load_copied(tmp_path, load_config(tmp_path), torch.float32, as_stored=True)
    assert {parameter.dtype for parameter in found.parameters()} == {stored}
    weights = dict(found.named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(weights[name].float(), parameter)
    buffers = dict(found.named_buffers())
    assert buffers
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer)
