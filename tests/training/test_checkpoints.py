"""What an unfinished run leaves on disk, and who may go on from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster_router.wire.errors import BundleError, ConfigError
from training.checkpoints import PartialRun, Saved, StageFiles

RUN: dict[str, Any] = {
    "settings": {"seed": 0, "workers": 1, "static": {"steps": 5, "learning_rate": 0.1}},
    "data": "somewhere",
}


def _saved(finished: bool = False) -> Saved:
    return Saved({"a.b": torch.arange(3.0)}, {"steps": 5, "loss": 0.1}, finished)


def _begun(tmp_path: Path) -> Path:
    """The place of the finished run, beside one that left a checkpoint."""
    out = tmp_path / "out"
    StageFiles(PartialRun.open(out, RUN, resume=False).folder).save("static", _saved())
    return out


def _with(**settings: Any) -> dict[str, Any]:
    return {**RUN, "settings": {**RUN["settings"], **settings}}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    files = StageFiles(tmp_path / "new")
    assert files.load("static") is None
    files.save("static", _saved())
    files.save("static", _saved(finished=True))
    loaded = files.load("static")
    assert loaded is not None
    assert (loaded.record, loaded.finished) == ({"steps": 5, "loss": 0.1}, True)
    assert torch.equal(loaded.tensors["a.b"], torch.arange(3.0))
    assert [path.name for path in files.folder.iterdir()] == ["static.safetensors"]


@pytest.mark.parametrize("content", [b"", b"cut off", pickle.dumps({"a": 1})])
def test_a_damaged_checkpoint_is_named_and_never_unpickled(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "static.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"static\.safetensors is damaged"):
        StageFiles(tmp_path).load("static")


def test_an_unfinished_run_is_refused_without_resume(tmp_path: Path) -> None:
    out = _begun(tmp_path)
    with pytest.raises(BundleError, match=r"out\.partial .*--resume"):
        PartialRun.open(out, RUN, resume=False)
    partial = PartialRun.open(out, RUN, resume=True)
    assert StageFiles(partial.folder).load("static") is not None
    partial.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ended_before_its_first_checkpoint_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = PartialRun.open(tmp_path / "out", RUN, resume=False).folder
    (folder / "stale").touch()
    for resume in (False, True):
        assert PartialRun.open(tmp_path / "out", _with(seed=1), resume).folder == folder
    assert not (folder / "stale").exists()


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (_with(seed=1), "settings.seed"),
        (_with(static={"steps": 6, "learning_rate": 0.1}), "settings.static.steps"),
        ({**RUN, "data": "elsewhere"}, "data"),
    ],
)
def test_another_run_is_not_gone_on_with(tmp_path: Path, run: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"other values of {name};"):
        PartialRun.open(_begun(tmp_path), run, resume=True)


def test_a_resumed_run_may_use_other_workers_and_rates(tmp_path: Path) -> None:
    run = _with(workers=[1, 4], max_failures=9, static={"steps": 5, "learning_rate": 0.01})
    PartialRun.open(_begun(tmp_path), run, resume=True)
