"""The bundle that ships for the default model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.artefact import Artefact
from training.base import FrozenBase
from training.config import load_settings
from training.data import WindowCutter, open_reader
from training.evaluation.evaluator import Evaluator, Subject
from training.evaluation.figures import GAINS
from training.evaluation.groups import Group
from training.evaluation.settings import EvaluateSettings, load_evaluate_settings
from training.evaluation.store import Store
from training.evaluation.tables import table

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "deploy" / "bundles" / "smollm2-135m-instruct"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def evaluation() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((BUNDLE / "evaluation.json").read_text())
    return loaded


def test_it_belongs_to_the_default_model_and_is_small(default_model: Path) -> None:
    artefact = Artefact.load(BUNDLE, FrozenBase(default_model).fingerprint)
    assert artefact.bundle.spec.depth == "full"
    size = sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file())
    assert size < 25 * MEGABYTE


def test_it_was_trained_by_the_recipe_in_the_repository() -> None:
    artefact = Artefact.load(BUNDLE, None)
    assert artefact.settings == load_settings(ROOT / "training" / "configs" / "full.yaml")


def test_it_was_not_trained_on_what_its_licence_forbids() -> None:
    domains = Artefact.load(BUNDLE, None).record["domains"]
    assert not [name for name in domains if name.startswith("brown") or name == "instructions"]


def test_its_card_prints_its_figures(evaluation: dict[str, Any]) -> None:
    card = (BUNDLE / "README.md").read_text()
    groups = [name for name in evaluation if name != "protocol"]
    assert "seen" in groups
    for name in groups:
        assert table(evaluation[name]) in card


def test_the_settings_in_it_are_those_it_was_measured_with(evaluation: dict[str, Any]) -> None:
    settings = load_evaluate_settings(BUNDLE / "training" / "evaluate.yaml")
    assert settings.model_dump(mode="json") == evaluation["protocol"]["settings"]
    assert "--settings <bundle>/training/evaluate.yaml" in (BUNDLE / "README.md").read_text()


def test_its_figures_agree_with_each_other(evaluation: dict[str, Any]) -> None:
    for name, report in evaluation.items():
        for figures in report["domains"].values() if name != "protocol" else ():
            nats = figures["nats_per_token"]
            for gain, (estimate, _, _) in figures["gains"].items():
                worse, better = GAINS[gain]
                assert estimate == pytest.approx(nats[worse] - nats[better], abs=2e-5)


def test_it_lowers_the_loss_over_the_base_model(evaluation: dict[str, Any]) -> None:
    _, low, _ = evaluation["seen"]["mean"]["gains"]["over_base"]
    assert low > 0


def test_it_does_so_again_on_a_small_sample(
    default_model: Path, text_by_domain: Path, tmp_path: Path
) -> None:
    base = FrozenBase(default_model)
    artefact = Artefact.load(BUNDLE, base.fingerprint)
    data = artefact.settings.data
    reader = open_reader(text_by_domain, data, tmp_path)
    cutter = WindowCutter(base.tokenizer, data.context_tokens, 96)
    windows = cutter.cut_split(reader, "test", ["customer_service", "sql"], 4)
    settings = EvaluateSettings.model_validate(
        {"variants": ["base", "hyper"], "stream": {"groups": []}}
    )
    evaluator = Evaluator(base, Subject(artefact.bundle), settings, Store(tmp_path / "scores"))
    [measured] = evaluator.measure([Group("sample", windows, [])])
    assert measured.sums["hyper"].sum() < measured.sums["base"].sum()
