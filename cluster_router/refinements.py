"""RefinementStore: refined updates of clusters, in a folder that one refiner writes."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import NoReturn

from cluster_router.files import Folder, digest
from cluster_router.wire.errors import BundleError

_NAME = re.compile(r"refined-(\d{1,18})-(\d{6})-([0-9a-f]{16})\.safetensors")

logger = logging.getLogger(__name__)


class RefinementStore:
    """Keeps of each cluster the last two refinements: routers learn of a new one a little later.

    Nothing of a prompt is in a file, only the numbers learned from many.

    Args:
        uri: a local path, or a URI such as `s3://bucket/refined`. Created when first written to.

    Raises:
        ConfigError: nothing installed opens such a URI.
    """

    def __init__(self, uri: str) -> None:
        self._folder = Folder(uri, "refinements")

    def newest(self) -> dict[int, int]:
        """Number of the newest refinement of each cluster that has any, by cluster id.

        Raises:
            SetupError: the folder cannot be listed.
        """
        found: dict[int, int] = {}
        for cluster, number, _ in self._entries():
            found[cluster] = max(number, found.get(cluster, 0))
        return found

    def save(self, cluster: int, number: int, data: bytes) -> None:
        """Keep refinement `number` (1 is the first) of a cluster, and drop all but the one before.

        Raises:
            SetupError: it cannot be written; what was there stays.
        """
        name = f"refined-{cluster}-{number:06d}-{digest(data)}.safetensors"
        self._folder.write(name, data)
        for other, old, stale in self._entries():
            if other == cluster and old < number - 1:
                self._remove(stale)

    def load(self, cluster: int, number: int) -> bytes | None:
        """A refinement; None where it is not there (any more).

        Raises:
            BundleError: it is damaged.
            SetupError: the folder cannot be listed.
        """
        for other, found, name in self._entries():
            if (other, found) != (cluster, number):
                continue
            try:
                data = self._folder.read(name)
            except FileNotFoundError:
                continue  # just replaced by a newer one
            if digest(data) not in name:
                raise BundleError(f"{name} is damaged: its checksum differs; remove it")
            return data
        return None

    def forget(self, cluster: int) -> None:
        """Remove every refinement of a cluster that is gone."""
        for other, _, name in self._entries():
            if other == cluster:
                self._remove(name)

    def _entries(self) -> list[tuple[int, int, str]]:
        matches = map(_NAME.fullmatch, self._folder.names())
        return [(int(match[1]), int(match[2]), match[0]) for match in matches if match]

    def _remove(self, name: str) -> None:
        try:
            self._folder.remove(name)
        except OSError as error:
            logger.warning("cannot remove the old refinement %s: %s", name, error)


class NewestRefinements:
    """What a store holds, as this process last saw it. Lives on one event loop.

    Attributes:
        numbers: of the newest refinement of each cluster that has any; always the same dictionary.
    """

    def __init__(self, store: RefinementStore) -> None:
        self._store = store
        self._failing = False
        self.numbers: dict[int, int] = {}

    async def refresh(self) -> None:
        """Look again. What cannot be listed is logged, and what was seen last stays."""
        try:
            found = await asyncio.to_thread(self._store.newest)
        except Exception as error:  # whatever the store's client raises, requests go on
            if not self._failing:
                logger.error("%s; requests go on with the refinements seen last", error)
            self._failing = True
            return
        self._failing = False
        self.numbers.clear()
        self.numbers.update(found)

    async def follow(self, interval_s: float) -> NoReturn:
        """Look each `interval_s`, for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(interval_s)
