"""The corpus of a run: the windows of every domain and split it reads, and their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster_router.wire.errors import ConfigError
from training.config import DataSettings
from training.data import Split, WindowCutter, domains_in, select
from training.features import FeatureCache, Features


@dataclass(frozen=True)
class Domains:
    """Which domains of a data folder are trained on (`seen`) and which are only measured."""

    seen: tuple[str, ...]
    excluded: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, settings: DataSettings) -> Domains:
        """Read the folder's domains.

        Raises:
            ConfigError: the folder is missing, no domain is left, or a held-out name is not there.
        """
        names = domains_in(folder, "train")
        for pattern in settings.holdout:
            if not select(names, [pattern]):
                raise ConfigError(
                    f"no domain of {folder} matches the held-out {pattern!r}; "
                    f"there are {', '.join(names)}",
                    "data.holdout",
                )
        excluded = select(names, settings.exclude)
        held_out = [name for name in select(names, settings.holdout) if name not in excluded]
        seen = tuple(name for name in names if name not in {*excluded, *held_out})
        if not seen:
            raise ConfigError(
                f"every domain of {folder} is excluded or held out; nothing is left to train on",
                "data.exclude",
            )
        return cls(seen, tuple(excluded), tuple(held_out))


@dataclass(frozen=True)
class Corpus:
    """Reads the splits of a data folder as features."""

    folder: Path
    settings: DataSettings
    domains: Domains
    cutter: WindowCutter
    cache: FeatureCache

    def split(self, split: Split, names: Sequence[str]) -> Features:
        """Features of one split of some domains, domain after domain."""
        limit = getattr(self.settings, f"{split}_documents")
        windows = self.cutter.cut_split(self.folder, split, names, limit)
        return self.cache.features(windows, f"{split} of {len(names)} domains")
