"""The bench of what a layout costs: its losses, and what it says of them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from layout_loss import domains, losses, summary
from traffic_cases import CONFIG, prompts, update_of

from lm_workers.build import build_engine
from lm_workers.models import load_causal_lm


def test_losses_are_those_of_transformers(tiny_llama: Path) -> None:
    asked = [tuple(prompt) for prompt in prompts(5) if len(prompt) > 1]
    engine, model = (
        build_engine(tiny_llama, CONFIG),
        load_causal_lm(tiny_llama, torch.float32, "cpu"),
    )
    expected = []
    for prompt in asked:
        tokens = torch.tensor([prompt])
        with torch.inference_mode():
            expected.append(float(model(input_ids=tokens, labels=tokens).loss))
    assert losses(engine, asked, [None] * len(asked)) == pytest.approx(expected, rel=1e-4)


def test_updates_are_applied(tiny_llama: Path) -> None:
    spec, bases, deltas = update_of(tiny_llama)
    engine = build_engine(tiny_llama, CONFIG, (spec, bases))
    prompt = tuple(range(2, 30))
    found = losses(engine, [prompt] * len(deltas), deltas)
    assert len(set(found)) == len(deltas) == 4


def test_the_first_documents_of_every_domain_are_read(tmp_path: Path) -> None:
    for name in ("a.validation", "b.validation", "b.test"):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(3))
    assert domains(tmp_path, 2) == [
        f"{name}.validation {number}" for name in "ab" for number in range(2)
    ]


def test_a_layout_is_told_beside_the_first() -> None:
    rows = {
        "auto": {"off": [2.0, 3.0], "on": [1.0, 1.0]},
        "int8": {"off": [2.1, 3.3], "on": [1, 1]},
    }
    told = summary(rows, "int8")
    assert "int8, 2 texts: off 2.7000 nats a token, +0.2000 (0.1000) [+0.100 to +0.300]" in told
    assert re.search(r"on 1\.0000 nats a token, \+0\.0000 \(0\.0000\)", told)
