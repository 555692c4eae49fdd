"""The two jobs of the command line: train a bundle, measure a bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster_router.wire.errors import BundleError
from training.artefact import Artefact
from training.base import FrozenBase
from training.config import TrainSettings
from training.corpus import Corpus
from training.data import Window
from training.dialogue import DialogueCutter
from training.evaluate import RESAMPLES, Evaluator
from training.features import Features
from training.full import FullTraining
from training.pipeline import HeadTraining, Trained
from training.runtime import Runtime

_WIKITEXT = "wikitext-2/test.raw.txt"


@dataclass(frozen=True)
class TrainJob:
    """A training run as plain values, so that it can be sent to a worker."""

    settings: TrainSettings
    data: str | Path
    cache: Path
    created_by: str

    def as_json(self) -> dict[str, Any]:
        """What is run, for an interrupted run to be recognised by."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "data": str(self.data),
            "in_this_process (workers 0)": self.settings.workers == 0,
        }

    def prepare(self) -> None:
        """Compute every feature the run needs, so that workers only read them."""
        if self.settings.depth == "head":
            self._text("cpu").features()

    def run(self, runtime: Runtime) -> Artefact:
        """Train; see `HeadTraining.run` and `FullTraining.run` for errors."""
        run = self._head if self.settings.depth == "head" else self._full
        trained, windows = run(runtime)
        domains = [window.domain for window in windows]
        record = trained.record | {
            "domains": {name: domains.count(name) for name in dict.fromkeys(domains)}
        }
        return Artefact(trained.bundle, self.settings, record)

    def _head(self, runtime: Runtime) -> tuple[Trained, list[Window]]:
        text = self._text("cpu")
        train, validation = text.features()
        training = HeadTraining(text.base, train, validation, self.settings, runtime)
        return training.run(self.created_by), train.windows

    def _full(self, runtime: Runtime) -> tuple[Trained, list[Window]]:
        text, data = self._text(str(runtime.device)), self.settings.data
        train, validation = text.windows()
        cutter = DialogueCutter(
            text.base.tokenizer,
            data.dialogues,
            data.dialogue_share,
            data.context_tokens + data.scored_tokens,
        )
        training = FullTraining(
            text.base, train, cutter.rewrite(train), validation, self.settings, runtime
        )
        return training.run(self.created_by), train

    def _text(self, device: str) -> TrainingText:
        base = FrozenBase.resolve(self.settings.model, device)
        return TrainingText(base, Corpus.open(self.data, self.settings.data, base, self.cache))


@dataclass(frozen=True)
class TrainingText:
    """What a run is trained and validated on."""

    base: FrozenBase
    corpus: Corpus

    def features(self) -> tuple[Features, Features]:
        """Features to train and to validate on, of the domains seen."""
        seen = self.corpus.domains.seen
        return self.corpus.split("train", seen), self.corpus.split("validation", seen)

    def windows(self) -> tuple[list[Window], list[Window]]:
        """Windows to train and to validate on, of the domains seen."""
        seen = self.corpus.domains.seen
        return self.corpus.windows("train", seen), self.corpus.windows("validation", seen)


@dataclass(frozen=True)
class EvaluateJob:
    """Measures a trained bundle on the test split and writes figures and card into its folder.

    Args:
        bundle: folder that a training run left.
        data: data folder, or a hub dataset (see `open_reader`).
        cache: feature cache.
        holdout: folder of a bundle of the same recipe with domains held out, already evaluated:
            its figures on those domains are carried over, named as what they are.
    """

    bundle: Path
    data: str | Path
    cache: Path
    holdout: Path | None = None

    def run(self) -> dict[str, Any]:
        """The figures, after they are written.

        Raises:
            BundleError: the bundle is damaged or of another model, or `holdout` has no figures.
            ConfigError: the data folder cannot be used.
        """
        artefact = Artefact.load(self.bundle, None)
        settings = artefact.settings
        base = FrozenBase.resolve(settings.model)
        artefact = Artefact.load(self.bundle, base.fingerprint)
        corpus = Corpus.open(self.data, settings.data, base, self.cache)
        evaluator = Evaluator(base, artefact.bundle, artefact.bundle.bases)
        evaluation = self._measure(corpus, evaluator)
        if self.holdout is not None:
            evaluation["twin"] = _twin_figures(self.holdout, settings)
        artefact.with_evaluation(evaluation).replace(self.bundle)
        return evaluation

    def _measure(self, corpus: Corpus, evaluator: Evaluator) -> dict[str, Any]:
        data = corpus.settings
        figures: dict[str, Any] = {
            "protocol": {
                "split": "test",
                "context_tokens": data.context_tokens,
                "scored_tokens": data.scored_tokens,
                "resamples": RESAMPLES,
                "interval": "95 %, documents resampled within each domain",
            },
        }
        for group in ("seen", "excluded", "held_out"):
            if names := getattr(corpus.domains, group):
                losses = evaluator.losses(corpus.split("test", names), group)
                figures[group] = evaluator.report(losses)
        path = Path(self.data) / _WIKITEXT
        if windows := corpus.cutter.cut_running_text(path, "wikitext-2", data.test_documents):
            features = corpus.cache.features(windows, "wikitext-2")
            figures["wikitext"] = evaluator.report(evaluator.losses(features, "wikitext-2"))
        return figures


def _twin_figures(path: Path, settings: TrainSettings) -> dict[str, Any]:
    """Figures on domains held out of the bundle at `path`, else trained like this one."""
    try:
        evaluation = json.loads((path / "evaluation.json").read_bytes())
        figures: dict[str, Any] = evaluation["held_out"]
        other = Artefact.load(path, None).settings
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(
            f"{path} has no figures of held-out domains: {error}", "holdout"
        ) from error
    data = other.data.model_copy(update={"holdout": settings.data.holdout})
    if other.model_copy(update={"data": data}) != settings:
        raise BundleError(f"{path} was trained with other settings than this bundle", "holdout")
    return figures
