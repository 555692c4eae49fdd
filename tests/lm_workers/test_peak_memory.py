"""What an engine takes beside the libraries: the weights as they are stored, and what it caches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster_router.wire.errors import ConfigError
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
config = EngineConfig(dtype=sys.argv[2], linear=sys.argv[3], device="cpu", cpu_threads=1)
engine = build_engine(path, config)
sampling = SamplingParams(max_tokens=2, temperature=0)
for number in range(4):
    prompt = tuple(range(100 + number, 132 + number))
    engine.add(TokenizedRequest(str(number), prompt, sampling, Assignment(key=None)), None)
while engine.has_work:
    engine.step()
print(memory("VmHWM") - libraries, memory("VmRSS") - libraries)
"""


def peak_and_after(model: Path, dtype: str, linear: str) -> tuple[float, float]:
    """As shares of what is stored."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), dtype, linear],
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    stored = (model / "model.safetensors").stat().st_size
    peak, after = map(int, done.stdout.split())
    return peak / stored, after / stored


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_takes_little_more_than_the_stored_weights(
    cxx: str, default_model: Path, dtype: str
) -> None:
    layout = choose_layout("auto", DTYPES[dtype], "cpu")
    if layout not in (PanelProduct, PairProduct, TileProduct):
        pytest.skip(f"this CPU does not compute in {dtype}, or torch does it for it")
    peak, after = peak_and_after(default_model, dtype, "auto")
    # Beside the weights: the embedding once more, a matrix on its way, activations, allocators.
    assert peak < 1.6
    # The embedding is the head's panels then.
    assert after < 1.35


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_8_bits_it_takes_less_than_is_stored(cxx: str, default_model: Path, dtype: str) -> None:
    try:
        choose_layout("int8", DTYPES[dtype], "cpu")
    except ConfigError as error:
        pytest.skip(str(error))
    peak, after = peak_and_after(default_model, dtype, "int8")
    assert peak < 1.6
    assert after < 0.85


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
