"""The job: what it writes, that it goes on where it was stopped, and that any folder will do."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from cluster_router.wire.errors import BundleError, ConfigError, SetupError
from training.artefact import Artefact
from training.base import FrozenBase
from training.cli import main
from training.evaluation import job
from training.evaluation.evaluator import Evaluator, Subject
from training.evaluation.groups import Group
from training.evaluation.job import EvaluateJob, twin_figures
from training.evaluation.scores import Work
from training.evaluation.settings import EvaluateSettings, load_evaluate_settings
from training.evaluation.store import Store

VARIANTS = ("base", "static", "hyper", "nearest", "shuffled", "stream", "refined", "oracle")


@pytest.fixture(scope="module")
def bundle(random_artefact: Artefact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    random_artefact.save(folder)
    return folder


@pytest.fixture(scope="module")
def cheap(quick_settings: EvaluateSettings) -> EvaluateSettings:
    return quick_settings.model_copy(update={"variants": VARIANTS, "batch": 4})


class StoppedError(Exception):
    """As if the process had been killed."""


class FragileStore(Store):
    """Ends the run when it has kept so many results."""

    left = 10**9

    def add(self, scores) -> None:  # type: ignore[no-untyped-def]
        FragileStore.left -= 1
        if FragileStore.left < 0:
            raise StoppedError
        super().add(scores)


@pytest.fixture(scope="module")
def finished(
    bundle: Path, data: Path, cheap: EvaluateSettings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that a whole run wrote; its cache is beside it."""
    root = tmp_path_factory.mktemp("finished")
    EvaluateJob(bundle, data, root / "cache", root / "out", cheap).run()
    return root / "out"


def test_it_writes_figures_a_report_plots_and_documents(finished: Path) -> None:
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert {"protocol", "seen", "unseen"} == set(evaluation)
    report = (finished / "report.md").read_text()
    unseen = evaluation["unseen"]
    for name in VARIANTS:
        nats = unseen["mean"]["nats_per_token"].get(name) or unseen["part"]["nats_per_token"][name]
        assert f"| {name} | {nats:.4f} |" in report
    for domain in ("numbers", "secret"):
        assert f"| {domain} | 6 |" in report
    assert "`merge`: not asked for" in report
    assert {"support", "arrived", "threshold", "reliability", "distribution"} <= set(
        unseen["curves"]
    )
    rows = [json.loads(line) for line in (finished / "documents.jsonl").read_text().splitlines()]
    assert len(rows) == 18
    sums = [row["nats"]["static"] for row in rows if row["domain"] == "secret"]
    tokens = [row["scored_tokens"] for row in rows if row["domain"] == "secret"]
    expected = unseen["domains"]["secret"]["nats_per_token"]["static"]
    assert sum(sums) / sum(tokens) == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_figures_of_the_cpu(
    bundle: Path,
    data: Path,
    cheap: EvaluateSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.base.resolve_dtype", lambda *_: torch.float32)
    found = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(job, "pick_device", lambda _, device=device: device)
        run = EvaluateJob(bundle, data, tmp_path / device, tmp_path / f"{device}-out", cheap)
        found.append(run.run()["unseen"]["mean"]["nats_per_token"])
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_plots_are_drawn(finished: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = {path.name for path in (finished / "plots").iterdir()}
    curves = ("domains", "support", "arrived", "threshold", "reliability", "distribution")
    assert {f"unseen-{curve}.png" for curve in curves} <= drawn
    report = (finished / "report.md").read_text()
    assert all(f"(plots/{name})" in report for name in drawn)


def test_a_stopped_run_goes_on_to_the_same_figures(
    bundle: Path,
    data: Path,
    cheap: EvaluateSettings,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.evaluation.job.Store", FragileStore)
    job = EvaluateJob(bundle, data, tmp_path / "cache", tmp_path / "out", cheap)
    for kept in (3, 9):
        FragileStore.left = kept
        with pytest.raises(StoppedError):
            job.run()
    (scores,) = (tmp_path / "cache").rglob("scores.jsonl")
    with scores.open("ab") as file:
        file.write(b'["cut off", 1.')
    assert not (tmp_path / "out").exists()
    FragileStore.left = 10**9
    job.run()
    for name in ("evaluation.json", "report.md", "documents.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()


def test_a_second_run_computes_nothing(
    bundle: Path,
    data: Path,
    cheap: EvaluateSettings,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.evaluation.job.Store", FragileStore)
    FragileStore.left = 0
    cache = finished.parent / "cache"
    EvaluateJob(bundle, data, cache, tmp_path / "out", cheap).run()
    figures = (tmp_path / "out" / "evaluation.json").read_bytes()
    assert figures == (finished / "evaluation.json").read_bytes()


def test_any_folder_of_domains_will_do(
    bundle: Path, data: Path, cheap: EvaluateSettings, tmp_path: Path
) -> None:
    """One file a domain, no splits, names that nobody has seen."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for source, name in (("secret", "poems"), ("numbers", "ledgers")):
        shutil.copy(data / f"{source}.train.jsonl.gz", folder / f"{name}.jsonl.gz")
    job = EvaluateJob(bundle, folder, tmp_path / "cache", tmp_path / "out", cheap)
    evaluation = job.run()
    assert sorted(evaluation["unseen"]["domains"]) == ["ledgers", "poems"]
    assert "seen" not in evaluation
    documents = [figures["documents"] for figures in evaluation["unseen"]["domains"].values()]
    assert documents == [6, 6]


def test_a_domain_of_one_document_is_named(
    bundle: Path, cheap: EvaluateSettings, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with gzip.open(folder / "lonely.test.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "all alone in the world"}) + "\n")
    with pytest.raises(ConfigError, match="'lonely' holds 1 document"):
        EvaluateJob(bundle, folder, tmp_path / "cache", tmp_path / "out", cheap).run()


def test_figures_reach_the_bundle_only_when_asked_for(
    bundle: Path, finished: Path, cheap: EvaluateSettings, data: Path, tmp_path: Path
) -> None:
    assert not (bundle / "evaluation.json").exists()
    copy = shutil.copytree(bundle, tmp_path / "tiny")
    cache = finished.parent / "cache"
    EvaluateJob(copy, data, cache, tmp_path / "out", cheap, record=True).run()
    assert json.loads((copy / "evaluation.json").read_text()) == json.loads(
        (finished / "evaluation.json").read_text()
    )
    card = (copy / "README.md").read_text()
    assert "### Unseen domains, never trained on" in card
    gpu = torch.cuda.is_available()
    cpu = f"CPU, {torch.get_num_threads()} threads ("
    assert (torch.cuda.get_device_name() if gpu else cpu) in card
    assert f", torch {torch.__version__}), 2026-02-03." in card
    # The command in the card, with the file it names, would measure the same.
    assert "--record \\\n    --settings <bundle>/training/evaluate.yaml\n" in card
    assert load_evaluate_settings(copy / "training" / "evaluate.yaml") == cheap


def test_progress_counts_refinements_only_for_variants_that_need_them(
    base: FrozenBase,
    random_artefact: Artefact,
    groups: list[Group],
    cheap: EvaluateSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[int] = []
    plan = Work.plan
    monkeypatch.setattr(
        Work, "plan", lambda work, tokens: (planned.append(tokens), plan(work, tokens))
    )

    def training(*variants: str) -> int:
        """Tokens that were planned beside those that are scored."""
        chosen = cheap.model_copy(update={"variants": variants})
        store = Store(tmp_path / "-".join(variants))
        planned.clear()
        Evaluator(base, Subject(random_artefact.bundle), chosen, store).measure(groups)
        return sum(planned[1:])

    assert training("hyper", "stream") == 0
    common, own = training("refined_common"), training("refined_own")
    refined, random = training("refined"), training("refined_random")
    assert 0 < common < refined
    assert own > 0
    assert training("refined", "refined_random", "refined_own") == refined + random + own


def test_a_baseline_of_the_whole_budget(
    bundle: Path, random_artefact: Artefact, data: Path, cheap: EvaluateSettings, tmp_path: Path
) -> None:
    wide, other = tmp_path / "wide", tmp_path / "other"
    bases = random_artefact.bundle.bases
    doubled = dataclasses.replace(bases, u=tuple(2 * u for u in bases.u))
    wider = dataclasses.replace(random_artefact.bundle, bases=doubled)
    dataclasses.replace(random_artefact, bundle=wider).save(wide)
    few = cheap.model_copy(update={"variants": ("static", "budget_static", "hyper")})
    cache = tmp_path / "cache"
    figures = EvaluateJob(bundle, data, cache, tmp_path / "out", few, budget=wide).run()
    means = figures["seen"]["mean"]["nats_per_token"]
    assert means["budget_static"] != means["static"]
    assert figures["seen"]["mean"]["gains"]["over_budget"][0] == pytest.approx(
        means["budget_static"] - means["hyper"], abs=2e-5
    )
    seeded = random_artefact.settings.model_copy(update={"seed": 5})
    dataclasses.replace(random_artefact, settings=seeded).save(other)
    with pytest.raises(BundleError, match="other settings of 'seed'"):
        EvaluateJob(bundle, data, cache, tmp_path / "out", few, budget=other).run()


def test_a_twin_may_have_been_trained_in_another_number_of_workers(
    random_artefact: Artefact, tmp_path: Path
) -> None:
    random_artefact.save(tmp_path / "twin")
    (tmp_path / "twin" / "evaluation.json").write_text('{"held_out": {"domains": {}}}')
    own = random_artefact.settings
    place = {"workers": (1, 4), "worker_cpus": 2.0, "max_failures": 0}
    assert own.workers == 0
    assert twin_figures(tmp_path / "twin", own.model_copy(update=place)) == {"domains": {}}
    with pytest.raises(BundleError, match="other settings"):
        twin_figures(tmp_path / "twin", own.model_copy(update={**place, "seed": 7}))


def test_the_command_line(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("resamples: 100\nstream: {warmup_documents: 4}\n")
    places = ["--bundle", str(bundle), "--data", str(data), "--cache", str(tmp_path / "cache")]
    options = ["--settings", str(settings), "--out", str(tmp_path / "out"), "--documents", "2"]
    command = ["evaluate", *places, *options]
    assert main([*command, "--variants", "base,static,hyper"]) == 0
    assert "| **mean** |" in capsys.readouterr().out
    assert main([*command, "--variants", "base,best"]) == 2
    assert "there is no variant 'best'" in capsys.readouterr().err


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("stream: {warmup: sometimes}\n")
    with pytest.raises(ConfigError, match=r"stream\.warmup"):
        load_evaluate_settings(path)
    path.write_text("document: 3\n")
    with pytest.raises(ConfigError, match="document"):
        load_evaluate_settings(path)
    assert load_evaluate_settings(None, seed=4).quick().seed == 4


def test_a_loss_that_is_not_finite_is_never_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(SetupError, match="NaN or infinite"):
        store.add({"a": [1.0], "b": [float("nan")]})
    assert Store(tmp_path).score("a") is None


def test_a_store_keeps_the_first_score(tmp_path: Path) -> None:
    Store(tmp_path).add({"a": [1.0]})
    again = Store(tmp_path)
    again.add({"a": [2.0], "b": [3.0, 4.0]})
    assert Store(tmp_path).score("a") == (1.0,)
    assert Store(tmp_path).score("b") == (3.0, 4.0)
