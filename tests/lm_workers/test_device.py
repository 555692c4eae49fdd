"""How many cores there are to compute on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.device import usable_cores


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
