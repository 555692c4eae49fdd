"""From a folder of text to a measured bundle, on a tiny random model."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapter_gen.bundle import Bundle
from cluster_router.wire.errors import BundleError
from training.artefact import Artefact
from training.base import FrozenBase
from training.cli import main
from training.config import TrainSettings
from training.data.licences import Licence
from training.evaluation.figures import GAINS
from training.evaluation.job import EvaluateJob
from training.evaluation.settings import EvaluateSettings
from training.jobs import TrainJob
from training.runtime import InProcess

CHEAP = EvaluateSettings.model_validate(
    {
        "documents": 12,
        "resamples": 500,
        "variants": ["base", "static", "hyper", "shuffled"],
        "stream": {"groups": []},
    }
)


def measure(folder: Path, data: Path, cache: Path, holdout: Path | None = None) -> dict[str, Any]:
    """Evaluate and write the figures into the bundle."""
    out = folder.with_name(f"{folder.name}-evaluation")
    return EvaluateJob(folder, data, cache, out, CHEAP, holdout=holdout, record=True).run()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(
    settings: TrainSettings, data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A trained and measured bundle. Read only."""
    folder = tmp_path_factory.mktemp("run") / "bundle"
    animals = Licence(source="made up", licence="CC0-1.0", note="they repeat")
    job = TrainJob(settings, data, cache, "a test", {"animals": animals})
    job.run(InProcess()).save(folder)
    measure(folder, data, cache)
    return folder


@pytest.fixture(scope="module")
def evaluation(trained: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((trained / "evaluation.json").read_text())
    return loaded


def test_the_bundle_loads_for_its_own_base_model_only(trained: Path, base: FrozenBase) -> None:
    bundle = Bundle.load(trained, base.fingerprint)
    assert (bundle.spec.depth, bundle.spec.rank, len(bundle.snapshot)) == ("head", 4, 4)
    assert bundle.token_weights is not None
    with pytest.raises(BundleError, match="belongs to"):
        Bundle.load(trained, "0" * 16)


def test_training_lowers_the_loss_on_held_out_documents(evaluation: dict[str, Any]) -> None:
    mean = evaluation["seen"]["mean"]
    nats, gains = mean["nats_per_token"], mean["gains"]
    assert nats["hyper"] < nats["base"] - 0.5
    assert gains["over_base"][1] > 0.5, "the interval must stay clear of no gain"


def test_the_two_domains_are_told_apart_by_their_clusters(evaluation: dict[str, Any]) -> None:
    gains = evaluation["seen"]["mean"]["gains"]
    assert gains["net"][1] > 0
    assert gains["conditioning"][1] > 0


def test_figures_agree_with_each_other(evaluation: dict[str, Any]) -> None:
    for group in ("seen", "unseen"):
        for figures in evaluation[group]["domains"].values():
            nats = figures["nats_per_token"]
            assert tuple(nats) == CHEAP.variants
            for gain, (estimate, low, high) in figures["gains"].items():
                worse, better = GAINS[gain]
                assert estimate == pytest.approx(nats[worse] - nats[better], abs=2e-5)
                assert low <= estimate <= high


def test_excluded_domains_are_measured_and_never_trained_on(
    trained: Path, evaluation: dict[str, Any]
) -> None:
    record = Artefact.load(trained, None).record
    assert sorted(record["domains"]) == ["animals", "numbers"]
    assert sorted(evaluation["seen"]["domains"]) == ["animals", "numbers"]
    assert sorted(evaluation["unseen"]["domains"]) == ["secret"]


def test_the_card_prints_the_figures(trained: Path, evaluation: dict[str, Any]) -> None:
    card = (trained / "README.md").read_text()
    mean = evaluation["seen"]["mean"]
    for value in mean["nats_per_token"].values():
        assert f"{value:.4f}" in card
    assert f"{mean['gains']['conditioning'][0]:+.4f}" in card
    assert "(`data.exclude`): `secret`" in card
    assert "| animals | 24 | made up | CC0-1.0 |" in card
    assert "| numbers | 24 | not stated | not stated |" in card
    assert "- `animals`: they repeat." in card


def test_the_same_seed_gives_the_same_bundle(
    settings: TrainSettings, data: Path, cache: Path, trained: Path
) -> None:
    again = TrainJob(settings, data, cache, "a test").run(InProcess())
    assert again.bundle.hypernetwork_id == Artefact.load(trained, None).bundle.hypernetwork_id


def test_measuring_again_gives_the_same_figures(
    trained: Path, data: Path, cache: Path, tmp_path: Path, evaluation: dict[str, Any]
) -> None:
    copy = shutil.copytree(trained, tmp_path / "bundle")
    assert measure(copy, data, cache) == evaluation
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle-evaluation"]


def test_a_twin_with_domains_held_out_lends_its_figures(
    settings: TrainSettings, trained: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    held_out = settings.data.model_copy(update={"holdout": ("numbers",)})
    twin = settings.model_copy(update={"data": held_out})
    TrainJob(twin, data, cache, "a test").run(InProcess()).save(tmp_path / "twin")
    figures = measure(tmp_path / "twin", data, cache)["held_out"]
    assert list(figures["domains"]) == ["numbers"]
    copy = shutil.copytree(trained, tmp_path / "bundle")
    assert measure(copy, data, cache, tmp_path / "twin")["twin"] == figures
    assert "same recipe" in (copy / "README.md").read_text()


def test_a_twin_of_another_recipe_is_refused(
    settings: TrainSettings, trained: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    held_out = settings.data.model_copy(update={"holdout": ("numbers",)})
    twin = settings.model_copy(update={"data": held_out, "rank": 2})
    TrainJob(twin, data, cache, "a test").run(InProcess()).save(tmp_path / "twin")
    measure(tmp_path / "twin", data, cache)
    copy = shutil.copytree(trained, tmp_path / "bundle")
    with pytest.raises(BundleError, match="other settings"):
        measure(copy, data, cache, tmp_path / "twin")


def test_a_bundle_without_its_training_folder_cannot_be_measured(
    trained: Path, data: Path, cache: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained, tmp_path / "bundle")
    shutil.rmtree(copy / "training")
    with pytest.raises(BundleError, match="cannot be evaluated"):
        measure(copy, data, cache)


@pytest.fixture
def arguments(settings: TrainSettings, data: Path, cache: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return ["--config", str(config), "--data", str(data), "--cache", str(cache)]


def test_the_command_line_trains_and_measures(
    arguments: list[str], data: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = str(tmp_path / "out")
    assert main(["train", *arguments, "--out", out, "--seed", "3"]) == 0
    places = ["--bundle", out, "--data", str(data), "--cache", str(cache)]
    assert main(["evaluate", *places, "--documents", "4", "--variants", "base,hyper"]) == 0
    assert "| **mean** |" in capsys.readouterr().out
    assert Artefact.load(Path(out), None).bundle.seed == 3


def test_domains_held_out_on_the_command_line_replace_the_configs_and_have_to_be_there(
    arguments: list[str], settings: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = settings.model_dump(mode="json")
    recipe["data"]["holdout"] = ["numbers", "poems"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    kept: dict[str | None, list[str]] = {None: ["animals"], "": ["animals", "numbers"]}
    for given, domains in kept.items():
        out = tmp_path / f"out{len(domains)}"
        chosen = [] if given is None else ["--holdout", given]
        assert main(["train", *arguments, "--out", str(out), *chosen]) == 0
        assert sorted(Artefact.load(out, None).record["domains"]) == domains
    capsys.readouterr()
    command = ["train", *arguments, "--out", str(tmp_path / "typo"), "--holdout", "numbres"]
    assert main(command) == 2
    assert "no domain of the data matches the held-out 'numbres'" in capsys.readouterr().err


def test_an_existing_folder_is_refused_before_any_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_domain_of_one_document_ends_with_a_message(
    arguments: list[str],
    make_data: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = make_data(tmp_path / "data")
    with gzip.open(folder / "lonely.train.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "all alone"}) + "\n")
    arguments[arguments.index("--data") + 1] = str(folder)
    assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "exclude the domain 'lonely'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
