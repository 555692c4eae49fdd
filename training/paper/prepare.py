"""From text to the examples of both protocols: cut, encoded once by the frozen model, cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster_router.wire.errors import ConfigError
from training.base import FrozenBase
from training.data import Window
from training.features import FeatureCache
from training.paper.examples import (
    UNSCORED,
    Examples,
    Splits,
    honest_examples,
    published_examples,
)
from training.paper.settings import PaperSettings
from training.paper.states import StateCache, draw_positions
from training.paper.text import (
    Sources,
    honest_windows,
    padding_token,
    published_sequences,
    read_text,
)


@dataclass(frozen=True, eq=False)
class Published:
    """Examples of the published protocol for each of its losses.

    Attributes:
        last: the last position against its own token.
        every: random positions against the next token.
        ends_padded: bool [N], whether a validation sequence ends in padding.
        padding: share of padding among the next tokens of the validation sequences.
    """

    last: Splits
    every: Splits
    ends_padded: torch.Tensor
    padding: float


@dataclass(frozen=True, eq=False)
class Honest:
    """Examples of the honest protocol; `splits` chooses the epoch, `test` is what is reported."""

    splits: Splits
    test: Examples


@dataclass(frozen=True)
class Preparation:
    """Reads the text and runs the model; `cache` is the folder of computed states."""

    settings: PaperSettings
    sources: Sources
    base: FrozenBase
    cache: Path

    def published(self) -> Published:
        """Examples of the published protocol.

        Raises:
            ConfigError: a text is missing or empty, the model cannot pad, or nothing is scored.
            SetupError: the cache cannot be written.
        """
        sources, settings = self.sources, self.settings
        train = self._lines(sources.train, settings.train_sequences)
        validation = self._lines(sources.validation, settings.validation_sequences)
        parts = [
            self._encoded(train, "training lines"),
            self._encoded(validation, "validation lines"),
        ]
        last, every = zip(*parts, strict=True)
        if any((part.targets == UNSCORED).all() for part in last):
            raise ConfigError(
                "every line ends in token 0, this model's padding, which the published loss leaves "
                "out; give more or longer lines, or another model",
                "text",
            )
        is_padding = validation == padding_token(self.base.tokenizer)
        share = float(is_padding[:, 1:].double().mean())
        return Published(Splits(*last), Splits(*every), is_padding[:, -1], share)

    def honest(self) -> Honest:
        """Examples of the honest protocol.

        Raises:
            ConfigError: a text is missing or too short.
            SetupError: the cache cannot be written.
        """
        sources, settings = self.sources, self.settings
        training = self._windows(sources.train, settings.train_windows)
        if sources.test is None:
            both = settings.validation_windows + settings.test_windows
            windows = self._windows(sources.validation, both)
            half = min(len(windows) // 2, settings.validation_windows)
            validation, test = windows[:half], windows[half:]
        else:
            validation = self._windows(sources.validation, settings.validation_windows)
            test = self._windows(sources.test, settings.test_windows)
        splits = Splits(
            self._scored(training, "training windows"),
            self._scored(validation, "validation windows"),
        )
        return Honest(splits, self._scored(test, "test windows"))

    def _lines(self, path: Path, limit: int | None) -> torch.Tensor:
        text = read_text(path)
        return published_sequences(self.base.tokenizer, text, self.settings.length, limit)

    def _encoded(self, sequences: torch.Tensor, label: str) -> tuple[Examples, Examples]:
        cache = StateCache(self.cache, self.base.fingerprint, self.base.encode)
        positions = draw_positions(len(sequences), self.settings.length, self.settings.positions)
        states = cache.states(sequences, positions, label)
        return published_examples(sequences, positions, states, self.base.embedding)

    def _windows(self, path: Path, limit: int | None) -> list[Window]:
        settings, text = self.settings, read_text(path)
        return honest_windows(self.base.tokenizer, text, settings.length, settings.context, limit)

    def _scored(self, windows: Sequence[Window], label: str) -> Examples:
        cache = FeatureCache(self.cache, self.base.fingerprint, self.base.encode)
        return honest_examples(cache.features(windows, label), self.base.embedding)
