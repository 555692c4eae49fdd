"""The loss that the evaluator reports is the loss of what is served, document by document.

The service scores each document over HTTP (`echo`, `logprobs`); the evaluator takes its own path
through the transformers model. Both judge a document's cluster by its first 128 tokens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from adapter_gen.bundle import Bundle
from cluster_router.wire.types import AdapterKey
from training.artefact import Artefact
from training.base import FrozenBase
from training.config import DataSettings
from training.data import Document, Window, WindowCutter, open_reader
from training.evaluation.evaluator import Evaluator, Measured, Subject
from training.evaluation.groups import Group
from training.evaluation.settings import EvaluateSettings
from training.evaluation.store import Store

pytestmark = pytest.mark.serve

ROOT = Path(__file__).parents[2]
UNLIKE_ANY_CLUSTER = "chess"
DOMAINS = ("customer_service", "licences", "pubmed", "sql", "technical_docs", "wikipedia")

# Both sides compute in float32 and differ in the order of their sums: some 1e-5 nats a token.
FLOAT32 = 1e-4
# The figures of a run come from bfloat16 weights and states: a document's mean is off by a few
# thousandths of a nat. Both variants err alike, so that a gain, their difference, errs less.
BFLOAT16 = 1.5e-2
BFLOAT16_GAIN = 2e-3


@dataclass(frozen=True)
class Served:
    """Mean loss of a document's scored tokens, in nats, and what the service scored it under."""

    loss: float
    cluster: int | None
    adapter_key: str | None


def score(service, window: Window, adaptation: object, prompt: str | None = None) -> Served:
    answer = service.openai().completions.create(
        model=service.model, prompt=prompt or window.tokens.tolist(),
        max_tokens=0, echo=True, logprobs=0, extra_body={"adaptation": adaptation},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs.token_logprobs
    assert len(logprobs) == len(window.tokens)
    used = answer.adaptation
    return Served(-float(np.mean(logprobs[window.context :])), used["cluster"], used["adapter_key"])


def evaluate(base: FrozenBase, bundle: Bundle, windows: list[Window], folder: Path) -> Measured:
    settings = EvaluateSettings.model_validate(
        {"variants": ["base", "static", "hyper"], "batch": 1, "stream": {"groups": []}}
    )
    evaluator = Evaluator(base, Subject(bundle), settings, Store(folder))
    return evaluator.measure([Group("served", windows, [])])[0]


def served_key(bundle: Bundle, measured: Measured, index: int) -> AdapterKey:
    """What the evaluator scored a document under."""
    snapshot = bundle.snapshot
    return bundle.key(snapshot, snapshot.row(measured.facts[index].cluster))


@pytest.fixture(scope="module")
def base(float32_base: FrozenBase) -> FrozenBase:
    return float32_base


@pytest.fixture(scope="module")
def artefact(bundle_path: Path, base: FrozenBase) -> Artefact:
    return Artefact.load(bundle_path, base.fingerprint)


@pytest.fixture(scope="module")
def bundle(artefact: Artefact) -> Bundle:
    return artefact.bundle


@pytest.fixture(scope="module")
def cutter(artefact: Artefact, base: FrozenBase) -> WindowCutter:
    data = artefact.settings.data
    assert artefact.bundle.embedding is not None
    assert artefact.bundle.embedding.tokens == data.context_tokens
    return WindowCutter(base.tokenizer, data.context_tokens, data.scored_tokens)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    files = sorted((Path(__file__).parent / "documents").glob("*.txt"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}


@pytest.fixture(scope="module")
def windows(texts: dict[str, str], cutter: WindowCutter, base: FrozenBase) -> list[Window]:
    """One for each text; it holds the text whole, so that the text can be sent as it is."""
    found = [cutter.cut(Document(text, name)) for name, text in texts.items()]
    for window in found:
        assert window is not None
        assert window.context == cutter.context
        assert window.tokens.tolist() == base.tokenizer(texts[window.domain])["input_ids"]
    return found


@pytest.fixture(scope="module")
def evaluated(
    base: FrozenBase,
    bundle: Bundle,
    windows: list[Window],
    tmp_path_factory: pytest.TempPathFactory,
) -> Measured:
    return evaluate(base, bundle, windows, tmp_path_factory.mktemp("scores"))


def test_each_document_has_the_evaluators_loss(
    service, bundle: Bundle, texts: dict[str, str], windows: list[Window], evaluated: Measured
) -> None:
    clusters = {facts.cluster for facts in evaluated.facts}
    assert len(clusters) > 4, "the documents should differ in cluster"
    for index, window in enumerate(windows):
        text = texts[window.domain]
        losses = {name: sums[index] / window.scored for name, sums in evaluated.sums.items()}
        off = score(service, window, "off", text)
        assert off.adapter_key is None
        assert off.loss == pytest.approx(losses["base"], abs=FLOAT32)
        auto = score(service, window, "auto", text)
        key = served_key(bundle, evaluated, index)
        assert (auto.cluster, auto.adapter_key) == (key.cluster, key.id)
        assert auto.loss == pytest.approx(losses["hyper"], abs=FLOAT32)
        assert abs(losses["hyper"] - losses["base"]) > 10 * FLOAT32, "the update should be felt"


def test_a_document_of_no_cluster_has_the_loss_of_the_static_update(
    service, windows: list[Window], evaluated: Measured
) -> None:
    unassigned = [i for i, facts in enumerate(evaluated.facts) if not facts.assigned]
    assert [windows[i].domain for i in unassigned] == [UNLIKE_ANY_CLUSTER]
    [index] = unassigned
    expected = evaluated.sums["static"][index] / windows[index].scored
    served = score(service, windows[index], "auto")
    assert served.cluster is None
    assert served.adapter_key is not None
    assert served.loss == pytest.approx(expected, abs=FLOAT32)


def test_a_forced_cluster_has_the_loss_of_that_cluster(
    service, bundle: Bundle, windows: list[Window], evaluated: Measured
) -> None:
    index = next(i for i, window in enumerate(windows) if window.domain == "recipe")
    row = bundle.snapshot.row(evaluated.facts[index].cluster)
    assert row is not None
    cluster, other = (int(bundle.snapshot.ids[r]) for r in (row, row - 1))
    right = score(service, windows[index], cluster)
    wrong = score(service, windows[index], other)
    expected = evaluated.sums["hyper"][index] / windows[index].scored
    assert right.loss == pytest.approx(expected, abs=FLOAT32)
    assert abs(wrong.loss - expected) > 10 * FLOAT32


def test_figures_of_a_run_agree_within_their_precision(
    service,
    default_model: Path,
    bundle: Bundle,
    windows: list[Window],
    tmp_path: Path,
) -> None:
    """An evaluation run computes in bfloat16."""
    losses = evaluate(FrozenBase(default_model), bundle, windows, tmp_path)
    gains = []
    for index, window in enumerate(windows):
        base_loss, hyper = (losses.sums[v][index] / window.scored for v in ("base", "hyper"))
        off, auto = (score(service, window, mode).loss for mode in ("off", "auto"))
        assert off == pytest.approx(base_loss, abs=BFLOAT16)
        assert auto == pytest.approx(hyper, abs=BFLOAT16)
        gains.append((off - auto, base_loss - hyper))
    served_gain, gain = np.mean(gains, axis=0)
    assert served_gain == pytest.approx(gain, abs=BFLOAT16_GAIN)


def test_so_do_documents_of_the_data_folder(
    service, base: FrozenBase, bundle: Bundle, cutter: WindowCutter, tmp_path: Path
) -> None:
    folder = Path(os.environ.get("CHAMELEON_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no text by domain: set CHAMELEON_DATA to a folder of it")
    reader = open_reader(folder, DataSettings(), tmp_path)
    windows = []
    for domain in DOMAINS:
        cut = cutter.cut_split(reader, "test", [domain], 24)
        # A shorter document is conditioned on half of its tokens, where the service takes 128.
        windows += [window for window in cut if window.context == cutter.context][:2]
    assert len(windows) >= len(DOMAINS)
    losses = evaluate(base, bundle, windows, tmp_path)
    totals = {"base": 0.0, "hyper": 0.0}
    for index, window in enumerate(windows):
        auto = score(service, window, "auto")
        assert auto.cluster == served_key(bundle, losses, index).cluster
        for variant, served in (("base", score(service, window, "off")), ("hyper", auto)):
            expected = losses.sums[variant][index] / window.scored
            assert served.loss == pytest.approx(expected, abs=FLOAT32)
            totals[variant] += served.loss
    assert totals["hyper"] < totals["base"]
