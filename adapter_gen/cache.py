"""DeltaCache: generated updates by content key, bounded by the bytes they hold."""

from __future__ import annotations

from cachetools import LRUCache

from adapter_gen.update import LoraDelta
from cluster_router.wire.types import AdapterKey


class DeltaCache(LRUCache[AdapterKey, LoraDelta]):
    """Drops the least recently used updates to stay within `max_bytes`. For one thread.

    Storing an update larger than `max_bytes` raises ValueError.

    Attributes:
        evicted: how many updates were dropped to make room.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, getsizeof=lambda delta: delta.nbytes)
        self.evicted = 0

    def popitem(self) -> tuple[AdapterKey, LoraDelta]:
        """Drop and return the least recently used entry."""
        item = super().popitem()
        self.evicted += 1
        return item
