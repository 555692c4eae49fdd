"""Sources in a dataset of the hub, or of a local folder in its layout, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster_router.wire.errors import ConfigError, SetupError
from training.data.documents import Split
from training.data.optional import load
from training.data.sources import SPLIT_NAMES, Source, shares_of
from training.data.tables import Columns, Row, stamp_files

PREFIX = "hub:"
_BATCH = 256


@dataclass(frozen=True)
class HubTable:
    """One split of a dataset, memory-mapped from the library's own cache."""

    name: str
    dataset: Any

    def stamp(self) -> str:
        """Of the files in the library's cache, whose paths name the dataset's revision."""
        files = [Path(file["filename"]) for file in self.dataset.cache_files]
        return f"{self.name} {self.dataset.num_rows}\n{stamp_files(Path('/'), files)}"

    def count(self) -> int:
        """Rows."""
        return int(self.dataset.num_rows)

    def rows(self, columns: Columns) -> Iterator[tuple[int, Row]]:
        """Rows; a label of a fixed set of classes is given by its name."""
        chosen = columns.of(self.dataset.column_names, self.name)
        labels = getattr(self.dataset.features.get(columns.domain), "names", None)
        batches = self.dataset.select_columns(chosen).with_format("arrow").iter(batch_size=_BATCH)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                if labels is not None and row[columns.domain] is not None:
                    row[columns.domain] = labels[row[columns.domain]]
                yield number, row


def hub_sources(location: str, columns: Columns) -> list[Source]:
    """Sources of `hub:<organisation>/<dataset>[:<configuration>]`, fetched where not cached.

    Raises:
        SetupError: `datasets` is missing, or the dataset cannot be fetched.
        ConfigError: no split of it can be told to be for training or testing.
    """
    dataset, _, configuration = location.removeprefix(PREFIX).partition(":")
    library = load("datasets", "datasets", f"--data {location}")
    # Anything may come out of reading another's files: DatasetsError stands for most of it.
    errors = (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError)
    try:
        splits = library.load_dataset(dataset, configuration or None)
    except errors as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise SetupError(
            f"cannot load {location}: {error}{cause}; check the name and the "
            "configuration (hub:<organisation>/<dataset>[:<configuration>]), the connection, and "
            "that there is room in the folder that HF_HOME names",
            "data",
        ) from error
    named = {name: SPLIT_NAMES[name] for name in splits if name in SPLIT_NAMES}
    if not named and len(splits) > 1:
        raise ConfigError(
            f"{location} has the splits {', '.join(splits)}, none of which is called train, "
            "validation or test; write those that you want to files <domain>.<split>.parquet",
            "data",
        )
    roles: dict[str, Split | None] = {**(named or dict.fromkeys(splits))}
    domain = None if columns.domain else _domain(dataset, configuration)
    present = set(named.values())
    return [
        Source(
            HubTable(f"{location} ({name})", splits[name]),
            columns,
            domain,
            shares_of(split, present),
        )
        for name, split in roles.items()
    ]


def _domain(dataset: str, configuration: str) -> str:
    name = Path(dataset).name
    return f"{name}-{configuration}" if configuration else name
