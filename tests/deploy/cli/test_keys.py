"""Making, listing and removing API keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster_router.access import key_hash, read_keys


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path, chameleon) -> None:
    file = tmp_path / "keys.yaml"
    first = chameleon("keys", "add", "team", "--file", file).stdout.strip()
    options = ["--namespace", "a", "--requests-per-minute", "60"]
    second = chameleon("keys", "add", "other", "--file", file, *options).stdout.strip()
    assert first != second and min(len(first), len(second)) > 40
    team, other = read_keys(file)
    assert (team.name, team.sha256, team.namespace) == ("team", key_hash(first), None)
    assert (other.sha256, other.namespace, other.requests_per_minute) == (key_hash(second), "a", 60)
    assert first not in file.read_text() and second not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["keys.yaml"]

    listed = chameleon("keys", "list", "--file", file, "--json").stdout
    assert json.loads(listed)[1] == {"name": "other", "namespace": "a", "requests_per_minute": 60}
    assert team.sha256 not in listed
    assert "other" in chameleon("keys", "list", "--file", file).stdout

    assert chameleon("keys", "remove", "team", "--file", file).exit_code == 0
    assert read_keys(file) == (other,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "team"], "a key of 'team' already"),
        (["add", "x", "--requests-per-minute", "0"], "requests_per_minute"),
        (["add", "x", "--namespace", "a\nb"], "namespace"),
        (["add", ""], "name"),
        (["remove", "x"], "it has: team"),
    ],
)
def test_bad_requests_change_nothing(
    tmp_path: Path, chameleon, words: list[str], message: str
) -> None:
    file = tmp_path / "keys.yaml"
    assert chameleon("keys", "add", "team", "--file", file).exit_code == 0
    before = file.read_text()
    result = chameleon("keys", *words, "--file", file)
    assert result.exit_code == 2 and message in result.stderr
    assert file.read_text() == before


def test_a_file_that_cannot_be_written(tmp_path: Path, chameleon) -> None:
    result = chameleon("keys", "add", "team", "--file", tmp_path / "missing" / "keys.yaml")
    assert result.exit_code == 2 and "cannot write" in result.stderr
