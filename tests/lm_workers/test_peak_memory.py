"""What an engine takes beside the libraries: the weights as they are stored, and what it caches.

The first start of a model on a machine takes transformers' own, too, to be compared with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster_router.wire.errors import ConfigError
from lm_workers.layers.choose import choose_layout
from lm_workers.layers.panels import PairProduct, PanelProduct, TileProduct
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
print("transformers.modeling_utils" in sys.modules, file=sys.stderr)
"""


@dataclass(frozen=True)
class Start:
    """What one took, as shares of what is stored, and whether it needed transformers' classes."""

    peak: float
    after: float
    with_classes: bool


def start(model: Path, dtype: str, linear: str, cache: Path) -> Start:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), dtype, linear],
        capture_output=True, text=True, check=True, timeout=240,
        env={**os.environ, "CHAMELEON_CACHE": str(cache)},
    )  # fmt: skip
    stored = (model / "model.safetensors").stat().st_size
    peak, after = map(int, done.stdout.split())
    return Start(peak / stored, after / stored, done.stderr.splitlines()[-1] == "True")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_takes_little_more_than_the_stored_weights(
    cxx: str, default_model: Path, dtype: str, tmp_path: Path
) -> None:
    layout = choose_layout("auto", DTYPES[dtype], "cpu")
    if layout not in (PanelProduct, PairProduct, TileProduct):
        pytest.skip(f"this CPU does not compute in {dtype}, or torch does it for it")
    first, second = (start(default_model, dtype, "auto", tmp_path) for _ in range(2))
    assert first.with_classes and not second.with_classes
    assert first.peak < 2.4
    # Beside the weights: the embedding once more, a matrix on its way, activations, allocators.
    assert second.peak < 1.8
    # The embedding is the head's panels then.
    assert second.after < 1.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_8_bits_it_takes_less_than_is_stored(
    cxx: str, default_model: Path, dtype: str, tmp_path: Path
) -> None:
    try:
        choose_layout("int8", DTYPES[dtype], "cpu")
    except ConfigError as error:
        pytest.skip(str(error))
    first, second = (start(default_model, dtype, "int8", tmp_path) for _ in range(2))
    assert first.peak < 2.2
    assert second.peak < 1.8
    assert second.after < 0.85
