"""Recorded decoding steps, with a recorder that treats torch's operations as CUDA does kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from traffic_cases import CONFIG, answers, mixed, prompts, request, update_of

from adapter_gen.update import Depth
from lm_workers import build
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.graphs import Bucket, Decoded, Repeat, choose_bucket
from lm_workers.layers.head import AdaptedHead
from lm_workers.layers.reference import ReferenceKernels
from lm_workers.sequence import Span

WAITING = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")
"""Operations whose result Python must wait for."""


class Operations(TorchDispatchMode):
    """Notes every operation and its tensors; refuses those that wait for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        self.noted.append((func, args, kwargs or {}, found))
        return found

    def repeat(self) -> None:
        """Run them again over the same memory. No Python but this runs."""
        for func, args, kwargs, found in self.noted:
            for old, new in zip(
                tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@dataclass
class OperationRecorder:
    """Stands in for CudaRecorder."""

    recorded: int = 0
    repeated: list[int] = field(default_factory=list)

    def __call__(self, compute: Repeat) -> Repeat:
        compute()
        operations = Operations()
        # Told so, transformers leaves out checks that wait.
        with patch("torch.cuda.is_current_stream_capturing", return_value=True), operations:
            result = compute()
        number = self.recorded = self.recorded + 1

        def repeat() -> Decoded:
            self.repeated.append(number)
            operations.repeat()
            return result

        return repeat


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> OperationRecorder:
    recorder = OperationRecorder()
    monkeypatch.setattr(build, "choose_recorder", lambda *_: recorder)
    return recorder


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_recorded_steps_give_the_tokens_of_computed_ones(
    tiny_checkpoints: dict[str, Path], family: str, recorder: OperationRecorder
) -> None:
    spec, bases, deltas = update_of(tiny_checkpoints[family])
    engine = build_engine(tiny_checkpoints[family], CONFIG, (spec, bases))
    found = answers(engine, mixed(deltas))
    assert recorder.recorded >= 2 and len(recorder.repeated) > 20
    engine._runner._graphs = None
    repeated = len(recorder.repeated)
    assert answers(engine, mixed(deltas)) == found
    assert len(recorder.repeated) == repeated
    assert answers(engine, mixed([None])) != found


@pytest.mark.parametrize(("depth", "recorded"), [("full", True), ("head", True), ("paper", False)])
def test_logits_are_recorded_too_where_nothing_in_them_waits(
    tiny_llama: Path,
    depth: Depth,
    recorded: bool,
    recorder: OperationRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, bases, deltas = update_of(tiny_llama, depth)
    engine = build_engine(tiny_llama, CONFIG, (spec, bases))
    found = answers(engine, mixed(deltas))
    computed, compute = [], AdaptedHead.__call__

    def counted(head: AdaptedHead, *args: Any) -> torch.Tensor:
        computed.append(1)
        return compute(head, *args)

    steps, step = [], engine._runner.step
    monkeypatch.setattr(AdaptedHead, "__call__", counted)
    monkeypatch.setattr(engine._runner, "step", lambda batch: steps.append(1) or step(batch))
    repeated = len(recorder.repeated)
    assert answers(engine, mixed(deltas)) == found
    repeated = len(recorder.repeated) - repeated
    assert repeated > 10
    assert len(steps) - len(computed) == (repeated if recorded else 0)
    engine._runner._graphs = None
    assert answers(engine, mixed(deltas)) == found


def test_a_longer_context_takes_a_larger_graph(
    tiny_llama: Path, recorder: OperationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_workers.graphs._SMALLEST_CONTEXT", 16)
    asked = [(request(prompts(1)[0][:10], max_tokens=50, ignore_eos=True), None)]
    found = answers(build_engine(tiny_llama, CONFIG), asked)
    assert recorder.recorded == 3  # contexts of 16, 32 and 64 tokens
    monkeypatch.setattr("lm_workers.layers.reference.ReferenceKernels.most_context", 0)
    again = [(request(asked[0][0].prompt_tokens, max_tokens=50, ignore_eos=True), None)]
    assert answers(build_engine(tiny_llama, CONFIG), again) == found
    assert recorder.recorded == 3


def test_rows_that_are_read_in_groups_wait_for_nothing(
    tiny_llama: Path, recorder: OperationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompted = prompts(6)
    found = answers(build_engine(tiny_llama, CONFIG), [(request(one), None) for one in prompted])
    recorded = recorder.recorded
    monkeypatch.setattr("lm_workers.layers.reference._MOST_SLOTS", 512)  # two rows of the smallest
    again = answers(build_engine(tiny_llama, CONFIG), [(request(one), None) for one in prompted])
    assert again == found
    assert recorder.recorded == 2 * recorded


def test_what_cannot_be_recorded_is_computed_and_the_log_says_why(
    tiny_llama: Path, recorder: OperationRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    engine = build_engine(tiny_llama, CONFIG)
    body = engine._runner._body
    handle = body.register_forward_hook(lambda _, __, out: out * float(out[0, 0] < 1e9))
    asked = [(request(prompt), None) for prompt in prompts(3)]
    with caplog.at_level(logging.WARNING):
        found = answers(engine, asked)
    handle.remove()
    assert caplog.text.count("without CUDA graphs") == 1 and "not permitted" in caplog.text
    assert not recorder.repeated
    again = [(request(one.prompt_tokens), None) for one, _ in asked]
    assert answers(engine, again) == found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels run on the GPU there")
def test_the_kernels_for_a_gpu_give_the_tokens_of_the_reference(
    tiny_checkpoints: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from lm_workers.layers.gpu import GpuKernels

    spec, bases, deltas = update_of(tiny_checkpoints[family])
    found = []
    for kernels in (ReferenceKernels(), GpuKernels()):
        monkeypatch.setattr(build, "choose_kernels", lambda *_, kernels=kernels: kernels)
        engine = build_engine(tiny_checkpoints[family], CONFIG, (spec, bases))
        found.append(answers(engine, mixed(deltas)[:4]))
    assert found[0] == found[1]


def test_buckets() -> None:
    def spans(*lengths: int, slot: int = 0) -> list[Span]:
        found = []
        for length in lengths:
            one: Any = type("One", (), {"slot": slot})
            found.append(Span(one, length - 1, length))
        return found

    assert choose_bucket(spans(5), 16, min_rows=2) == Bucket(2, 16, False)
    assert choose_bucket(spans(5), 16, min_rows=1) == Bucket(1, 16, False)
    assert choose_bucket(spans(5, 9, 256, slot=3), 16, min_rows=2) == Bucket(4, 16, True)
    assert choose_bucket(spans(*[257] * 33), 16, min_rows=2) == Bucket(64, 32, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cuda_graphs_give_the_tokens_of_computed_steps(
    tiny_checkpoints: dict[str, Path], family: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec, bases, deltas = update_of(tiny_checkpoints[family])
    found = []
    for graphs in (True, False):
        config = EngineConfig(
            device="cuda",
            dtype="float32",
            max_sequences=4,
            kv_cache_tokens=1024,  # all are looked at after every step
            cuda_graphs=graphs,
        )
        engine = build_engine(tiny_checkpoints[family], config, (spec, bases))
        found.append(answers(engine, mixed(deltas)))
    assert found[0] == found[1]
    assert "without CUDA graphs" not in caplog.text
