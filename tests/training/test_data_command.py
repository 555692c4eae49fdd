"""`chameleon data`."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import yaml

from training.base import FrozenBase
from training.cli import main
from training.data.meter import meter


@pytest.fixture
def arguments(data: Path, tiny_llama: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "run.yaml"
    settings = {"exclude": ["secret"], "holdout": ["numbers"]}
    config.write_text(yaml.safe_dump({"model": str(tiny_llama), "data": settings}))
    options = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--config", str(config)]
    return ["data", *options]


def test_every_domain_is_listed_with_its_use(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:]] for line in lines[:5]
    }
    assert cells["animals"][:4] == ["trained on", "24", "24", "24"]
    assert cells["numbers"][0] == "held out"
    assert cells["secret"][0] == "excluded"
    assert cells["secret"][-2] == "unknown"
    assert len({line.count("|") for line in lines[:5]}) == 1


def test_the_figures_as_json_count_tokens(
    arguments: list[str], base: FrozenBase, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json", "--tokens"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["data"] == str(data)
    assert report["near_duplicates_dropped"] is False
    part = report["domains"]["numbers"]["splits"]["test"]
    assert (part["documents"], part["exact"]) == (24, 0)
    assert part["bytes"] > part["tokens"] > 24 * 24


def test_what_is_wrong_with_the_data_ends_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "--data", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 2
    assert "holds no data" in capsys.readouterr().err


def test_progress_tells_tokens_a_second_and_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with meter("tokenise", 4, "tok", delay=0) as advance:
        for _ in range(3):
            time.sleep(0.11)
            advance(50)
    last = capsys.readouterr().err.split("\r")[-1]
    clock = r"\d\d:\d\d"
    shown = rf"tokenise: +75%.* 3\.00/4\.00 \[{clock}<{clock}, .*doc/s, \d+tok/s\]"
    assert re.search(shown, last), last


def test_licences_come_from_a_file(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tmp_path / "licences.yaml"
    known.write_text("numbers: {source: counted, licence: CC0-1.0}\n")
    assert main([*arguments, "--licences", str(known)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "| numbers" in line]
    assert line.endswith("| CC0-1.0 |")


@pytest.mark.parametrize("text", ["numbers: {licence: MIT}", "numbers: {", "[1]"])
def test_a_file_of_licences_that_cannot_be_read_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    known = tmp_path / "licences.yaml"
    known.write_text(text)
    assert main([*arguments, "--licences", str(known)]) == 2
    assert str(known) in capsys.readouterr().err
