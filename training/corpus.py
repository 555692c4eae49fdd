"""The corpus of a run: the windows of every domain and split it reads, and their features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster_router.wire.errors import ConfigError
from lm_workers.models import describe_model
from training.base import FrozenBase
from training.config import DataSettings
from training.data import (
    Reader,
    Split,
    Window,
    WindowCutter,
    open_reader,
    require_documents,
    select,
)
from training.features import FeatureCache, Features

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Domains:
    """Which domains of a data set are trained on (`seen`) and which are only measured."""

    seen: tuple[str, ...]
    excluded: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def of(cls, reader: Reader, settings: DataSettings, asked_for: Sequence[str] = ()) -> Domains:
        """Sort the reader's domains.

        Args:
            reader: of the data.
            settings: which are excluded or held out. A recipe's held-out pattern that matches none
                is logged, for the recipe may have been written for other data.
            asked_for: patterns held out for this very data. One that matches none is refused: a
                slip of the pen would train on what was to be kept apart.

        Raises:
            ConfigError: no domain is left, or a domain asked for is not there.
        """
        names = reader.domains()
        missing = [pattern for pattern in settings.holdout if not select(names, [pattern])]
        for pattern in missing:
            if pattern in asked_for:
                raise ConfigError(
                    f"no domain of the data matches the held-out {pattern!r}; "
                    f"there are {', '.join(names)}",
                    "data.holdout",
                )
        if missing:
            _logger.warning(
                "no domain of the data matches data.holdout %s of the config; there are %s",
                ", ".join(repr(pattern) for pattern in missing),
                ", ".join(names),
            )
        excluded = select(names, settings.exclude)
        held_out = [name for name in select(names, settings.holdout) if name not in excluded]
        seen = tuple(name for name in names if name not in {*excluded, *held_out})
        if not seen:
            raise ConfigError(
                "every domain of the data is excluded or held out; nothing is left to train on",
                "data.exclude",
            )
        return cls(seen, tuple(excluded), tuple(held_out))


@dataclass(frozen=True)
class Corpus:
    """Reads the splits of a data set as features."""

    reader: Reader
    settings: DataSettings
    domains: Domains
    cutter: WindowCutter
    cache: FeatureCache

    @classmethod
    def open(
        cls,
        data: str | Path,
        settings: DataSettings,
        base: FrozenBase,
        cache: Path,
        asked_for: Sequence[str] = (),
    ) -> Corpus:
        """Open the data that `--data` names for a base model.

        Args:
            data: see `open_reader`.
            settings: which domains and how many documents, and how they are cut.
            base: tokenises the text and computes the features.
            cache: folder of computed features and inventories.
            asked_for: see `Domains.of`.

        Raises:
            ConfigError: there is no data, nothing to train on, or windows exceed the base model's
                context.
            SetupError: a library is missing, a dataset cannot be fetched, `cache` cannot be
                written.
        """
        cutter = WindowCutter(base.tokenizer, settings.context_tokens, settings.scored_tokens)
        longest = describe_model(base.path, base.path.name).context_length
        if cutter.longest > longest:
            raise ConfigError(
                f"windows of {cutter.longest} tokens do not fit in the base model's context of "
                f"{longest}; lower data.context_tokens or data.scored_tokens",
                "data.scored_tokens",
            )
        reader = open_reader(data, settings, cache)
        return cls(
            reader=reader,
            settings=settings,
            domains=Domains.of(reader, settings, asked_for),
            cutter=cutter,
            cache=FeatureCache(cache, base.fingerprint, base.encode),
        )

    def windows(self, split: Split, names: Sequence[str]) -> list[Window]:
        """Windows of one split of some domains, domain after domain.

        Raises:
            ConfigError: a domain cannot be read or has too few documents. Whoever reads the
                training split needs validation too: that is checked before features are computed.
            SetupError: the cache cannot be written.
        """
        if split == "train":
            for name in names:
                require_documents(self.reader, name, "validation")
        limit = getattr(self.settings, f"{split}_documents")
        most = self.settings.windows_per_document if split == "train" else 1
        return self.cutter.cut_split(self.reader, split, names, limit, most)

    def split(self, split: Split, names: Sequence[str]) -> Features:
        """Features of the same windows; see `windows` for errors."""
        windows = self.windows(split, names)
        return self.cache.features(windows, f"{split} of {len(names)} domains")
