"""The training job as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.artefact import Artefact
from training.base import FrozenBase
from training.config import TrainSettings
from training.corpus import Corpus
from training.data import Window
from training.data.licences import Licence
from training.dialogue import DialogueCutter
from training.features import Features
from training.full import FullTraining
from training.pipeline import HeadTraining, Trained
from training.runtime import Runtime


@dataclass(frozen=True)
class TrainJob:
    """A training run as plain values, so that it can be sent to a worker.

    Attributes:
        settings: of the run.
        data: what `--data` names.
        cache: folder of computed features.
        created_by: the command, for the record.
        licences: of domains, as far as they are known; for the record, too.
        held_out: those of the held-out patterns that were asked for by name rather than by a
            recipe; see `Domains.of`.
    """

    settings: TrainSettings
    data: str | Path
    cache: Path
    created_by: str
    licences: Mapping[str, Licence] = field(default_factory=dict)
    held_out: tuple[str, ...] = ()

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
        counts = {name: domains.count(name) for name in dict.fromkeys(domains)}
        record = trained.record | {
            "domains": counts,
            "licences": {
                name: self.licences[name].model_dump(exclude_none=True)
                for name in counts
                if name in self.licences
            },
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
        corpus = Corpus.open(self.data, self.settings.data, base, self.cache, self.held_out)
        return TrainingText(base, corpus)


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
