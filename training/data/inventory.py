"""The inventory of a data set: what is in it, and what is left out because it is there twice.

One pass over all text, the training split first, so that a text in two splits stays in the earlier
one and what is tested on was never trained on. The outcome is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster_router.wire.errors import SetupError
from training.data.documents import SPLITS, Document, Split
from training.data.meter import meter
from training.data.near import NearDuplicates
from training.data.sources import Source, text_key

_FORMAT = 2
"""Part of the name of a kept inventory: another way of counting finds none."""


@dataclass
class Part:
    """One split of one domain.

    Attributes:
        documents: how many are kept.
        bytes: UTF-8 length of those.
        empty: how many have no text.
        exact: how many are left out because the same text, white space aside, was met before.
        near: how many are left out because a text much like it was met before.
        dropped: `text_key`, in hexadecimal, of the texts that this part may not hold. A text that
            it does hold, but more than once, is not among them.
    """

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    exact: int = 0
    near: int = 0
    dropped: list[str] = field(default_factory=list)


Inventory = dict[str, dict[Split, Part]]
"""Parts by domain and split; a domain without documents in a split has no such part."""


def take_inventory(sources: Sequence[Source], near: bool, folder: Path) -> Inventory:
    """Read everything once, or find what an earlier call on the same files wrote to `folder`.

    Args:
        sources: what to read.
        near: whether near-duplicates are left out too.
        folder: where inventories are kept; created where missing.

    Raises:
        ConfigError: something cannot be read.
        SetupError: `folder` cannot be written, or a library is missing.
    """
    stamps = json.dumps([_FORMAT, near, *(source.stamp() for source in sources)])
    path = folder / f"{hashlib.sha256(stamps.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return _load(path)
    inventory = _Counter(near).run(sources)
    _save(inventory, path)
    return inventory


class _Counter:
    """Tells the first of each text from those that follow."""

    def __init__(self, near: bool) -> None:
        self._near = NearDuplicates() if near else None
        self._homes: dict[bytes, Part] = {}
        self._inventory: Inventory = {}

    def run(self, sources: Sequence[Source]) -> Inventory:
        total = sum(source.table.count() for source in sources)
        with meter("read and compare documents", total, "char") as advance:
            for split in SPLITS:
                for source in sources:
                    if source.holds(split):
                        for document in source.documents(split):
                            self._count(document, split)
                            advance(len(document.text))
        return dict(sorted(self._inventory.items()))

    def _count(self, document: Document, split: Split) -> None:
        part = self._inventory.setdefault(document.domain, {}).setdefault(split, Part())
        if not document.text.strip():
            part.empty += 1
            return
        key = text_key(document.text)
        home = self._homes.get(key)
        if home is not None:
            part.exact += 1
            if home is not part:
                part.dropped.append(key.hex())
            return
        self._homes[key] = part
        if self._near is not None and self._near.seen(document.text):
            part.near += 1
            part.dropped.append(key.hex())
            return
        part.documents += 1
        part.bytes += len(document.text.encode())


def _load(path: Path) -> Inventory:
    raw = json.loads(path.read_bytes())
    return {
        domain: {split: Part(**splits[split]) for split in SPLITS if split in splits}
        for domain, splits in raw.items()
    }


def _save(inventory: Inventory, path: Path) -> None:
    raw = {d: {s: asdict(part) for s, part in parts.items()} for d, parts in inventory.items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(raw))
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise SetupError(
            f"cannot write {path.parent}: {error}; "
            "free some space or name another folder with --cache",
        ) from error
