"""`chameleon train` stopped and resumed, as an operator would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from training.artefact import Artefact
from training.cli import main
from training.config import TrainSettings

COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
from training.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def arguments(
    settings: TrainSettings, data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A run long enough to be interrupted; everything but `--out`."""
    update = {"steps": 120, "evaluate_every": 5, "patience": 100}
    stages = {
        "static": settings.static.model_copy(update=update),
        "hyper": settings.hyper.model_copy(update={"steps": 20, "evaluate_every": 10}),
    }
    config = tmp_path_factory.mktemp("config") / "run.yaml"
    config.write_text(yaml.safe_dump(settings.model_copy(update=stages).model_dump(mode="json")))
    return ["train", "--config", str(config), "--data", str(data), "--cache", str(cache)]


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main([*arguments, "--out", str(out)]) == 0
    return Artefact.load(out, None)


def _stopped(arguments: list[str], out: Path, signal_number: int) -> subprocess.CompletedProcess:
    """The same command in a process of its own, which gets a signal after its first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments, "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    checkpoint = Path(f"{out}.partial") / "static.safetensors"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal_number)
    _, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stderr=errors)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_run_resumes_to_the_same_bundle(
    arguments: list[str],
    undisturbed: Artefact,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    number: signal.Signals,
    status: int,
) -> None:
    out = tmp_path / "out"
    stopped = _stopped(arguments, out, number)
    assert stopped.returncode == status, stopped.stderr
    assert ("--resume" in stopped.stderr) == (number is signal.SIGINT)
    assert not out.exists()

    assert main([*arguments, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err

    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    resumed = Artefact.load(out, None)
    assert resumed.record == undisturbed.record
    assert resumed.bundle.hypernetwork_id == undisturbed.bundle.hypernetwork_id
    assert not Path(f"{out}.partial").exists()


@pytest.mark.parametrize("workers", ["two", "1,x", "-1", "1,2,3", "0,2"])
def test_workers_are_a_count_or_a_range(
    arguments: list[str], tmp_path: Path, workers: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out"), f"--workers={workers}"]) == 2
    assert "workers" in capsys.readouterr().err
