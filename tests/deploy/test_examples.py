"""The tutorial's scripts: from chat logs to a folder that training reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from training.config import load_settings

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deploy/examples"


def run(script: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_exchange_becomes_a_document(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Where is my card? "},
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "Since when?"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Since Monday."},
    ]
    logs = tmp_path / "logs.jsonl"
    logs.write_text(json.dumps({"team": "Card/Support", "id": 7, "messages": turns}) + "\n")
    shown = run("logs_to_data.py", str(logs), str(tmp_path / "data"), "--domain", "team",
                "--source", "id")  # fmt: skip
    assert "2 documents" in shown
    assert read(tmp_path / "data/card_support.jsonl") == [
        {"text": "Where is my card?\n\nAnswer:\nOn its way.", "source": "7"},
        {"text": "Hello?\n\nAnswer:\nSince Monday.", "source": "7"},
    ]


def test_sample_logs_become_the_domains_of_the_small_recipe(tmp_path: Path) -> None:
    logs = tmp_path / "logs.jsonl"
    run("sample_logs.py", str(logs))
    run("logs_to_data.py", str(logs), str(tmp_path / "data"), "--domain", "team",
        "--source", "conversation")  # fmt: skip
    settings = load_settings(ROOT / "training/configs/small.yaml")
    for domain, separator in settings.data.dialogues.items():
        documents = read(tmp_path / f"data/{domain}.jsonl")
        assert len(documents) > settings.data.train_documents
        assert all(separator in one["text"] for one in documents)
        assert len({one["source"] for one in documents}) > 5, "splits need several sources"


def test_recipes_are_valid() -> None:
    for path in sorted((ROOT / "training/configs").glob("*.yaml")):
        if "depth" in yaml.safe_load(path.read_text()):
            load_settings(path)
