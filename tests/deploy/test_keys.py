"""Making API keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster_router.access import key_hash, read_keys
from deploy.keys import main


def test_a_key_is_shown_once_and_kept_as_a_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    assert main(["team", "--file", str(file)]) == 0
    first = capsys.readouterr().out.strip()
    arguments = ["--namespace", "a", "--requests-per-minute", "60"]
    assert main(["other", "--file", str(file), *arguments]) == 0
    second = capsys.readouterr().out.strip()
    assert first != second and min(len(first), len(second)) > 40
    team, other = read_keys(file)
    assert (team.name, team.sha256, team.namespace) == ("team", key_hash(first), None)
    assert (other.sha256, other.namespace, other.requests_per_minute) == (key_hash(second), "a", 60)
    assert first not in file.read_text() and second not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["team"], "a key of 'team' already"),
        (["x", "--requests-per-minute", "0"], "requests_per_minute"),
        (["x", "--namespace", "a\nb"], "namespace"),
        ([""], "name"),
    ],
)
def test_bad_requests_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    file = tmp_path / "keys.yaml"
    assert main(["team", "--file", str(file)]) == 0
    before = file.read_text()
    assert main([*arguments, "--file", str(file)]) == 2
    assert word in capsys.readouterr().err
    assert file.read_text() == before


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["team", "--file", str(tmp_path / "missing" / "keys.yaml")]) == 2
    assert "cannot write" in capsys.readouterr().err
