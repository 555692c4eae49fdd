"""Evaluations of several seeds side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.cli import main

NATS = {
    "a": [{"static": 200.0, "refined": 190.0}, {"static": 300.0, "refined": 280.0}],
    "b": [{"static": 100.0, "refined": 100.0}],
}


def write(folder: Path, shift: float, tokens: int = 100) -> Path:
    """An evaluation of three documents; refinement gains `shift` nats more on each."""
    folder.mkdir()
    lines = [
        json.dumps(
            {
                "group": "unseen",
                "domain": domain,
                "scored_tokens": tokens,
                "scored_bytes": 400,
                "nats": nats
                | {"refined": nats["refined"] - shift}
                | {"refined_shuffled": nats["refined"] - shift + 2},
            }
        )
        for domain, documents in NATS.items()
        for nats in documents
    ]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line[1:-1].split("|")]


def test_gains_of_each_seed_and_their_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write(tmp_path / name, shift) for name, shift in (("s0", 0.0), ("s1", 4.0))]
    assert main(["seeds", *map(str, folders)]) == 0
    head, _, static, line, _, over_shuffled = map(cells, capsys.readouterr().out.splitlines())
    assert head == ["group", "variant", "s0", "s1", "mean", "of the loss"]
    # Domain a loses 500 nats in 200 tokens, b 100 in 100.
    assert static == ["unseen", "static, its loss", "1.7500", "1.7500", "1.7500", ""]
    # Domain a gains 30 nats in 200 tokens, b none: 0.075 on average; 0.04 more in the other seed.
    assert line[:4] == ["unseen", "refined", "+0.0750", "+0.1150"]
    assert line[5] == "+5.43%"
    estimate, low, high = line[4].replace("[", "").replace("]", "").replace(",", "").split()
    assert (estimate, low) == ("+0.0950", "+0.0200")
    # Domain a drawn twice: its better document at 0.22 in both is rarer than one in forty.
    assert high == "+0.1950"
    # Shuffled loses 2 nats a document over refined, and each has 100 tokens.
    assert over_shuffled[1:5] == [
        "refined over refined_shuffled", "+0.0200", "+0.0200", "+0.0200 [+0.0200, +0.0200]",
    ]  # fmt: skip


def test_other_documents_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write(tmp_path / "one", 0.0), write(tmp_path / "other", 0.0, tokens=99)
    assert main(["seeds", str(one), str(other)]) == 2
    assert "did not score the same documents" in capsys.readouterr().err
    assert main(["seeds", str(one), str(tmp_path / "nothing")]) == 2
    assert "holds no evaluation" in capsys.readouterr().err
