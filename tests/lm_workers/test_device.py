"""How many cores there are to compute on, and which threads stay on them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest
from lm_workers.build import build_engine, step_budget
from lm_workers.config import EngineConfig
from lm_workers.device import in_passing_thread, usable_cores


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return 64


@pytest.mark.parametrize(
    ("limit", "usable"),
    [
        ("400000 100000", 4),
        ("250000 100000", 3),
        ("5000 100000", 1),
        ("9900000 100000", 64),
        ("max 100000", 64),
        ("max", 64),
        ("", 64),
    ],
)
def test_a_limit_of_version_2_counts(tmp_path: Path, cores: int, limit: str, usable: int) -> None:
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert usable_cores(tmp_path) == usable


@pytest.mark.parametrize(
    ("quota", "period", "usable"),
    [("400000", "100000", 4), ("150000", "50000", 3), ("-1", "100000", 64), ("4", "0", 64)],
)
def test_a_limit_of_version_1_counts(
    tmp_path: Path, cores: int, quota: str, period: str, usable: int
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text(period + "\n")
    assert usable_cores(tmp_path) == usable


def test_without_a_limit_all_cores_count(tmp_path: Path, cores: int) -> None:
    assert usable_cores(tmp_path) == cores


def test_an_engine_computes_on_the_usable_cores(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_workers.build.usable_cores", lambda: 3)
    before = torch.get_num_threads()
    try:
        build_engine(tiny_llama, EngineConfig(device="cpu", dtype="float32", kv_cache_tokens=1024))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_gpu_computes_more_of_a_prompt_beside_streams(tiny_llama: Path) -> None:
    config = EngineConfig(device="cpu", dtype="float32", kv_cache_tokens=1024, cpu_threads=2)
    usual = step_budget(config, "cpu", torch.float32).prompts
    assert step_budget(config, "cuda:0", torch.float32).prompts > usual
    for asked, expected in ((None, usual), (7, 7)):
        engine = build_engine(tiny_llama, config.model_copy(update={"prefill_chunk": asked}))
        sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
        for name, length in (("stream", 3), ("prompt", 60)):
            tokens = tuple(range(2, 2 + length))
            engine.add(TokenizedRequest(name, tokens, sampling, Assignment(key=None)), None)
            engine.step()  # the stream begins; then the prompt beside it
        [prompt] = [one for one in engine._scheduler.running if one.request_id == "prompt"]
        assert 0 < prompt.computed <= expected
        assert prompt.computed > expected // 2


def test_a_step_without_streams_is_larger_where_it_does_not_take_seconds() -> None:
    config = EngineConfig()
    slow = step_budget(config, "cpu", torch.float32).all
    assert step_budget(config, "cpu", torch.bfloat16).all > slow
    assert step_budget(config, "cuda:0", torch.float32).all > slow
    asked = config.model_copy(update={"max_batch_tokens": 40})
    assert step_budget(asked, "cpu", torch.bfloat16).all == 40


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_passing_thread_leaves_no_pool_of_threads_behind() -> None:
    numbers = torch.randn(400, 400)
    numbers @ numbers  # this thread's own pool stays
    before = threads()

    def compute() -> int:
        numbers @ numbers
        return threads()

    assert in_passing_thread(compute) > before
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == before
    with pytest.raises(ZeroDivisionError):
        in_passing_thread(lambda: 1 // 0)
