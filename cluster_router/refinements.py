"""RefinementStore: refined updates of clusters, in a folder that one refiner writes."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NoReturn

from cluster_router.files import Folder, digest
from cluster_router.wire.errors import BundleError
from cluster_router.wire.types import Place

_NAME = re.compile(r"refined-([0-9a-f]{16})-(-1|\d{1,18})-(\d{6})-([0-9a-f]{16})\.safetensors")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Refinement:
    """One refined update: the how manieth of its cluster, and the content id of its numbers."""

    number: int
    id: str


@dataclass(frozen=True, slots=True)
class _Entry:
    place: Place  # the namespace as a digest, so that it cannot be a path
    refinement: Refinement
    name: str


class RefinementStore:
    """Keeps of each place the last two refinements: routers learn of a new one a little later.

    What one namespace taught is never another's, even where both use a cluster of the bundle.
    Nothing of a prompt is in a file, only the numbers learned from many.

    Args:
        uri: a local path, or a URI such as `s3://bucket/refined`. Created when first written to.

    Raises:
        ConfigError: nothing installed opens such a URI.
    """

    def __init__(self, uri: str) -> None:
        self._folder = Folder(uri, "refinements")

    def newest(self) -> dict[Place, Refinement]:
        """The newest refinement of each place that has any; namespaces as `sealed`.

        Raises:
            SetupError: the folder cannot be listed.
        """
        found: dict[Place, Refinement] = {}
        for entry in self._entries():
            held = found.get(entry.place)
            if held is None or entry.refinement.number > held.number:
                found[entry.place] = entry.refinement
        return found

    def save(self, place: Place, data: bytes) -> None:
        """Keep a refinement of a place as its newest, and drop all but the one before.

        Raises:
            SetupError: it cannot be written; what was there stays.
        """
        own = (sealed(place[0]), place[1])
        old = [entry for entry in self._entries() if entry.place == own]
        last = max((entry.refinement.number for entry in old), default=0)
        namespace, cluster = own
        self._folder.write(
            f"refined-{namespace}-{cluster}-{last + 1:06d}-{digest(data)}.safetensors", data
        )
        for entry in old:
            if entry.refinement.number < last:
                self._remove(entry)

    def load(self, id: str) -> bytes | None:
        """The refinement with this content id; None where it is not there (any more).

        Raises:
            BundleError: it is damaged.
            SetupError: the folder cannot be listed.
        """
        for entry in self._entries():
            if entry.refinement.id != id:
                continue
            try:
                data = self._folder.read(entry.name)
            except FileNotFoundError:
                continue  # just replaced by a newer one
            if digest(data) != id:
                raise BundleError(f"{entry.name} is damaged: its checksum differs; remove it")
            return data
        return None

    def recall(self, place: Place) -> bytes | None:
        """The newest refinement of a place; None where there is none.

        Raises:
            BundleError: it is damaged.
            SetupError: the folder cannot be listed.
        """
        found = self.newest().get((sealed(place[0]), place[1]))
        return None if found is None else self.load(found.id)

    def trim(self, most: int, held: Collection[Place]) -> None:
        """Drop the refinements of places not in `held` while there are more than `most`."""
        safe = {(sealed(namespace), cluster) for namespace, cluster in held}
        entries = self._entries()
        places = list(dict.fromkeys(entry.place for entry in entries))
        spare = [place for place in places if place not in safe]
        gone = set(spare[: max(0, len(places) - most)])
        for entry in entries:
            if entry.place in gone:
                self._remove(entry)

    def _entries(self) -> list[_Entry]:
        matches = map(_NAME.fullmatch, sorted(self._folder.names()))
        return [
            _Entry((match[1], int(match[2])), Refinement(int(match[3]), match[4]), match[0])
            for match in matches
            if match
        ]

    def _remove(self, entry: _Entry) -> None:
        try:
            self._folder.remove(entry.name)
        except OSError as error:
            logger.warning("cannot remove the old refinement %s: %s", entry.name, error)


class NewestRefinements:
    """What a store holds, as this process last saw it. Lives on one event loop."""

    def __init__(self, store: RefinementStore) -> None:
        self._store = store
        self._failing = False
        self._found: dict[Place, Refinement] = {}

    def of(self, namespace: str, cluster: int) -> Refinement | None:
        """The newest of a cluster; None if it was never refined."""
        return self._found.get((sealed(namespace), cluster)) if self._found else None

    async def refresh(self) -> None:
        """Look again. What cannot be listed is logged, and what was seen last stays."""
        try:
            self._found = await asyncio.to_thread(self._store.newest)
        except Exception as error:  # whatever the store's client raises, requests go on
            if not self._failing:
                logger.error("%s; requests go on with the refinements seen last", error)
            self._failing = True
        else:
            self._failing = False

    async def follow(self, interval_s: float) -> NoReturn:
        """Look each `interval_s`, for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(interval_s)


def sealed(namespace: str) -> str:
    """A namespace as it appears in names of files."""
    return hashlib.sha256(namespace.encode()).hexdigest()[:16]
