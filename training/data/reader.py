"""The reader of a data set: its sources, with what the inventory leaves out left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from training.config import DataSettings
from training.data.documents import Document, Split
from training.data.folder import folder_sources
from training.data.hub import PREFIX, hub_sources
from training.data.inventory import Inventory, take_inventory
from training.data.sources import Source, text_key
from training.data.tables import Columns


class SourceReader:
    """Reads documents from sources; see `Reader`.

    Args:
        sources: where they are.
        inventory: of all of `sources`.
        near: whether near-duplicates were left out.
    """

    def __init__(self, sources: Sequence[Source], inventory: Inventory, near: bool) -> None:
        self._sources = sources
        self.inventory = inventory
        self.near = near

    def domains(self) -> list[str]:
        """See `Reader.domains`."""
        return list(self.inventory)

    def count(self, domain: str, split: Split) -> int:
        """See `Reader.count`."""
        part = self.inventory.get(domain, {}).get(split)
        return 0 if part is None else part.documents

    def documents(self, domain: str, split: Split) -> Iterator[Document]:
        """See `Reader.documents`."""
        if self.count(domain, split) == 0:
            return
        part = self.inventory[domain][split]
        gone = {bytes.fromhex(key) for key in part.dropped}
        repeats = part.exact > 0
        for source in self._sources:
            if source.domain not in (None, domain) or not source.holds(split):
                continue
            for document in source.documents(split):
                if document.domain != domain or not document.text.strip():
                    continue
                if repeats or gone:
                    key = text_key(document.text)
                    if key in gone:
                        continue
                    if repeats:
                        gone.add(key)
                yield document


def open_reader(data: str | Path, settings: DataSettings, cache: Path) -> SourceReader:
    """Open a folder or a hub dataset, reading all of it once if that was not done before.

    Near-duplicates are looked for, by default, only where the data comes without splits of its own:
    splits made here by a hash know nothing of two copies of a text, whereas ready splits are their
    author's concern, and dropping test documents would change which figures are measured.

    Args:
        data: a folder of text by domain, or `hub:<organisation>/<dataset>[:<configuration>]`.
        settings: names of columns, and whether near-duplicates are left out.
        cache: folder in which the outcome of that reading is kept.

    Raises:
        ConfigError: there is nothing there, or something that is not text.
        SetupError: a library is missing, a dataset cannot be fetched, `cache` cannot be written.
    """
    columns = Columns(settings.text_column, settings.group_column, settings.domain_column)
    location = str(data)
    if location.startswith(PREFIX):
        sources = hub_sources(location, columns)
    else:
        sources = folder_sources(Path(data), columns)
    near = settings.near_duplicates == "drop" or (
        settings.near_duplicates == "auto" and any(source.divided for source in sources)
    )
    return SourceReader(sources, take_inventory(sources, near, cache / "inventories"), near)
