"""What the doctor finds on this machine, and on worse ones."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy import diagnosis


def test_a_machine_that_runs_these_tests_can_serve(chameleon, default_model: Path) -> None:
    result = chameleon("doctor", "--json")
    assert result.exit_code == 0
    found = {one["name"]: one for one in json.loads(result.stdout)}
    assert {"python", "torch", "faiss", "ray", "cpu", "memory", "cache", "model"} <= found.keys()
    assert found["model"]["verdict"] == "ok" and str(default_model) in found["model"]["found"]
    assert "what to do" in chameleon("doctor").stdout


def test_what_is_missing_fails(chameleon) -> None:
    result = chameleon("doctor", "--model", "./nowhere")
    assert result.exit_code == 1
    assert "chameleon model fetch ./nowhere" in " ".join(result.stdout.split())


def test_a_model_that_is_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHAMELEON_CACHE", str(tmp_path))
    check = diagnosis.check_model("smollm2-135m-instruct")
    assert (check.verdict, check.advice) == ("warn", "chameleon model fetch")
    assert not list(tmp_path.iterdir()), "it only looks"


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        check = diagnosis.check_port(taken.getsockname()[1])
    assert check.verdict == "warn" and "taken" in check.found


def test_small_machines_are_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=2**26, free=2**26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(diagnosis, "_free_memory", lambda: 2**30)
    for check in (diagnosis.check_cache, diagnosis.check_shared_memory, diagnosis.check_memory):
        found = check()
        assert found.verdict == "warn" and found.advice


@pytest.mark.parametrize(
    ("setting", "verdict"),
    [
        ("always [madvise] never", "ok"),
        ("[always] madvise never", "ok"),
        ("always madvise [never]", "warn"),
        (None, "ok"),
    ],
)
def test_large_pages_that_are_switched_off(
    tmp_path: Path, setting: str | None, verdict: str
) -> None:
    place = tmp_path / "enabled"
    if setting is not None:
        place.write_text(setting + "\n")
    found = diagnosis.check_large_pages(place)
    assert found.verdict == verdict
    assert (str(place) in found.advice) == (verdict == "warn")


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_everything() -> diagnosis.Check:
        raise OSError("no such thing")

    found = diagnosis._guarded(check_everything)
    assert (found.name, found.verdict) == ("everything", "fail") and "no such" in found.found
