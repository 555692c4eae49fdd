"""The documents of an evaluation, in groups: seen domains, unseen domains, running text."""

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
    MIN_DOCUMENTS,
    Reader,
    Split,
    Window,
    WindowCutter,
    open_reader,
    select,
    spread,
)
from training.data.folder import REGRESSION_FOLDER, RUNNING_TEXTS, running_text
from training.evaluation.settings import EvaluateSettings

WIKITEXT = "wikitext-2"
_WIKITEXT_WINDOWS = 4
"""Times as many windows of it as documents of a domain, since it is one domain alone."""
_logger = logging.getLogger(__name__)

# Documents of unseen domains may come from any split, none of which was trained on. Those that are
# scored come from the test split as far as it goes, then from the next. Parts of one work are in
# one split, so those that only arrive come from splits that give no scored document as far as these
# go.
_SCORED: tuple[Split, ...] = ("test", "validation", "train")
_ARRIVING: tuple[Split, ...] = ("validation", "train", "test")


@dataclass(frozen=True, eq=False)
class Group:
    """Documents that are measured together.

    Attributes:
        name: `seen`, `unseen` or `wikitext`.
        windows: what is scored, domain after domain.
        warmup: what only arrives, if the group is a stream; contexts alone are used.
    """

    name: str
    windows: list[Window]
    warmup: list[Window]


@dataclass(frozen=True)
class GroupReader:
    """Reads the groups of a data set.

    Args:
        reader: of the data.
        folder: where WikiText-2 is looked for.
        cutter: cuts documents into windows.
        trained: domains that the bundle was trained on; all others are unseen.
        settings: how many documents.
    """

    reader: Reader
    folder: Path
    cutter: WindowCutter
    trained: frozenset[str]
    settings: EvaluateSettings

    @classmethod
    def open(
        cls,
        data: str | Path,
        base: FrozenBase,
        trained: Sequence[str],
        columns: DataSettings,
        settings: EvaluateSettings,
        cache: Path,
    ) -> GroupReader:
        """Open the data that `--data` names, cut as the bundle's training data was.

        Raises:
            ConfigError: there is no data, or windows exceed the base model's context.
            SetupError: a library is missing, a dataset cannot be fetched, `cache` cannot be
                written.
        """
        cutter = WindowCutter(base.tokenizer, columns.context_tokens, columns.scored_tokens)
        longest = describe_model(base.path, base.path.name).context_length
        if cutter.longest > longest:
            raise ConfigError(
                f"windows of {cutter.longest} tokens do not fit in the base model's context of "
                f"{longest}",
                "data.scored_tokens",
            )
        reader = open_reader(data, columns, cache)
        return cls(reader, Path(data), cutter, frozenset(trained), settings)

    def groups(self) -> list[Group]:
        """Every group that has documents.

        Raises:
            ConfigError: a domain has fewer than two documents, or none is left.
        """
        names = [name for name in self.reader.domains() if name != WIKITEXT]
        seen = [name for name in names if name in self.trained]
        unseen = [name for name in names if name not in self.trained]
        groups = [
            self._group("seen", seen, ("test",), ("validation",)),
            self._group("unseen", unseen, _SCORED, _ARRIVING),
            self._wikitext(),
        ]
        found = [group for group in groups if group.windows]
        if not found:
            raise ConfigError("the data holds no document to measure on", "data")
        return found

    def _group(
        self, name: str, domains: Sequence[str], scored: Sequence[Split], arriving: Sequence[Split]
    ) -> Group:
        group = Group(name, [], [])
        for domain in domains:
            windows, read = self._windows(domain, scored, self.settings.documents, frozenset())
            if len(windows) < MIN_DOCUMENTS:
                raise ConfigError(
                    f"{domain!r} holds {len(windows)} document(s) to measure on, at least "
                    f"{MIN_DOCUMENTS} are needed; add documents or remove the domain",
                    "data",
                )
            group.windows.extend(windows)
            if name in self.settings.stream.groups:
                taken = frozenset(window.tokens.tobytes() for window in windows)
                count = self.settings.stream.warmup_documents
                order = sorted(arriving, key=read.__contains__)
                group.warmup.extend(self._windows(domain, order, count, taken)[0])
        return group

    def _windows(
        self, domain: str, splits: Sequence[Split], limit: int, without: frozenset[bytes]
    ) -> tuple[list[Window], set[Split]]:
        """Up to `limit` windows from the first splits that have them, but for those `without`.

        And the splits that were read.
        """
        windows: list[Window] = []
        read: set[Split] = set()
        for split in splits:
            if len(windows) == limit:
                break
            read.add(split)
            most = limit + len(without)
            for document in spread(self.reader.documents(domain, split), most):
                window = self.cutter.cut(document)
                if window is not None and window.tokens.tobytes() not in without:
                    windows.append(window)
            windows = windows[:limit]
        return windows, read

    def _wikitext(self) -> Group:
        count = _WIKITEXT_WINDOWS * self.settings.documents
        path, beside = running_text(self.folder, "test"), self.folder / REGRESSION_FOLDER
        if path is None:
            if beside.is_dir():
                names = ", ".join(RUNNING_TEXTS["test"])
                _logger.warning("%s is not measured: it holds none of %s", beside, names)
            return Group("wikitext", [], [])
        return Group("wikitext", self.cutter.cut_running_text(path, WIKITEXT, count), [])


def unseen_kind(name: str, settings: DataSettings) -> str:
    """Why a domain is unseen: `excluded` by its licence, `held out`, or `new` to the project."""
    if select([name], settings.exclude):
        return "excluded"
    return "held out" if select([name], settings.holdout) else "new"
