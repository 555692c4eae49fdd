"""A data folder with two synthetic domains, and the settings of a run that takes seconds."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest

from training.base import FrozenBase
from training.config import TrainSettings
from training.evaluation import job

WORDS = {
    "animals": ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"],
    "numbers": ["0123", "4567", "8910", "1112", "1314", "1516", "1718", "1920"],
    "secret": ["Paris", "is", "the", "capital", "of", "France"],
}


class OneDay(date):
    """Today is always the same: two evaluations may be compared around midnight."""

    @classmethod
    def today(cls) -> OneDay:
        return cls(2026, 2, 3)


@pytest.fixture(scope="session", autouse=True)
def _one_day() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "date", OneDay)
        yield


def write_domain(folder: Path, domain: str, split: str, texts: list[str]) -> Path:
    """One gzipped JSONL file as the data folder holds them."""
    path = folder / f"{domain}.{split}.jsonl.gz"
    rows = [
        {"text": text, "domain": domain, "source": f"made-up:{domain}#{number}"}
        for number, text in enumerate(texts)
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="session")
def make_data() -> Callable[..., Path]:
    """Write a data folder with `documents` random texts for each domain and split."""

    def make(folder: Path, documents: int = 24, domains: tuple[str, ...] = tuple(WORDS)) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for domain in domains:
            for split in ("train", "validation", "test"):
                dice = random.Random(f"{domain} {split}")
                texts = [" ".join(dice.choices(WORDS[domain], k=24)) for _ in range(documents)]
                write_domain(folder, domain, split, texts)
        return folder

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, make_data: Callable[..., Path]) -> Path:
    """Three domains of 24 documents. Read only."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def base(tiny_llama: Path) -> FrozenBase:
    """The tiny random Llama."""
    return FrozenBase(tiny_llama)


@pytest.fixture(scope="session")
def settings(tiny_llama: Path) -> TrainSettings:
    """A run over two domains with the third excluded."""
    stage = {
        "steps": 60,
        "documents": 16,
        "positions": 16,
        "evaluate_every": 20,
        "candidates": None,
    }
    return TrainSettings.model_validate(
        {
            "model": str(tiny_llama),
            "rank": 4,
            "data": {
                "exclude": ["secret"],
                "context_tokens": 32,
                "scored_tokens": 32,
                "train_documents": 24,
                "validation_documents": 12,
                "test_documents": 12,
            },
            "clusters": {"count": 4},
            "hypernetwork": {"kind": "core", "width": 16},
            "static": {**stage, "learning_rate": 0.05},
            "hyper": {**stage, "learning_rate": 0.02, "episodes": 4, "clusters": [2, 6]},
        }
    )


@pytest.fixture(scope="session")
def text_by_domain() -> Path:
    """The folder of real text that figures are measured on; skips where it is not there."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("CHAMELEON_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no text by domain: set CHAMELEON_DATA to a folder of it")
    return folder
