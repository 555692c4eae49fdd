"""Assigns embeddings to clusters, over a snapshot that can be replaced while requests run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster_router.index import CentroidIndex
from cluster_router.refinements import Refinement
from cluster_router.vocabulary import Describe
from cluster_router.wire.errors import BundleError, UnknownClusterError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import AdapterKey, Assignment, ClusterInfo, Conditioning, FloatArray

IndexFactory = Callable[[FloatArray], CentroidIndex]
Mode = Literal["auto", "off"] | int


@dataclass(frozen=True)
class _Clusters:
    """A snapshot and what was built from it. Whoever holds one sees a single moment."""

    snapshot: ClusterSnapshot
    index: CentroidIndex
    describe: Describe
    described_from: int
    words: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def words_of(self, rows: Sequence[int]) -> list[tuple[str, ...]]:
        """Characteristic tokens of the clusters in `rows`, found when first asked for.

        Those of a small cluster would say what few people wrote: it has none. An earlier snapshot's
        are not taken over, though most would do: every router is to give the same.
        """
        large = self.snapshot.sizes >= self.described_from
        missing = [row for row in rows if large[row] and row not in self.words]
        if missing:
            directions = self.snapshot.directions[missing]
            self.words.update(zip(missing, self.describe(directions), strict=True))
        return [self.words.get(row, ()) for row in rows]


class Assigner:
    """Chooses the update a prompt runs under.

    Args:
        snapshot: the clusters to begin with; `ClusterSnapshot.empty` where there are none.
        index_factory: builds the search index over a snapshot's centroids.
        base: content id of the base model, for adapter keys.
        hypernetwork: content id of the hypernetwork checkpoint, for adapter keys. None where
            nothing can be adapted: every request then runs on the base model.
        describe: names clusters for people; without it they are shown without words.
        described_from: prompts that a cluster must stand for to be described.
        refined: the newest refinement of a cluster's update, None if it was never refined. Asked
            anew for each prompt.
    """

    def __init__(
        self,
        snapshot: ClusterSnapshot,
        index_factory: IndexFactory,
        base: str,
        hypernetwork: str | None,
        describe: Describe | None = None,
        described_from: int = 0,
        refined: Callable[[int], Refinement | None] | None = None,
    ) -> None:
        self._index_factory = index_factory
        self._base = base
        self._hypernetwork = hypernetwork
        self._describe = describe or _no_words
        self._described_from = described_from
        self._refined = refined or _never
        self._clusters = self._build(snapshot)

    @property
    def snapshot(self) -> ClusterSnapshot:
        """The snapshot in use."""
        return self._clusters.snapshot

    def swap(self, snapshot: ClusterSnapshot) -> None:
        """Use `snapshot` from the next call on; calls under way keep the one they began with.

        Raises:
            BundleError: its embeddings are of another size.
        """
        if snapshot.dim != self.snapshot.dim:
            raise BundleError(
                f"snapshot {snapshot.version} has embeddings of size {snapshot.dim}, "
                f"this service embeds to {self.snapshot.dim}"
            )
        self._clusters = self._build(snapshot)

    def assign(self, embedding: FloatArray, mode: Mode = "auto") -> Assignment:
        """Assign one prompt; depends on nothing but the arguments and the snapshot.

        Args:
            embedding: float32 [d], unit length.
            mode: `"auto"`, `"off"` (the unadapted base model) or the id of a cluster.

        Raises:
            UnknownClusterError: no cluster has the id `mode`.
        """
        clusters = self._clusters
        if mode == "off" or (mode == "auto" and self._hypernetwork is None):
            return Assignment(key=None, snapshot_version=clusters.snapshot.version)
        if mode != "auto":
            return self._adapted(clusters.snapshot, _row(clusters.snapshot, mode), None)
        seen = clusters.snapshot.project(embedding)
        similarities, rows = clusters.index.search(seen[None], 1)
        similarity = float(similarities[0, 0]) if similarities.size else None
        if similarity is None or similarity < clusters.snapshot.threshold:
            return self._static(clusters.snapshot, similarity)
        return self._adapted(clusters.snapshot, int(rows[0, 0]), similarity)

    def conditioning(self, cluster: int) -> tuple[AdapterKey, Conditioning]:
        """Key of a cluster's update, and what its hypernetwork is given.

        Raises:
            UnknownClusterError: no cluster has this id.
        """
        snapshot = self.snapshot
        row = _row(snapshot, cluster)
        return self._key(snapshot, row), snapshot.conditioning_of(row)

    def table(self) -> tuple[ClusterSnapshot, list[ClusterInfo]]:
        """The snapshot, and every cluster of it in its order.

        To find words for the clusters of a new snapshot takes a while: where an event loop must not
        wait, call this in a thread, and `cluster` too.
        """
        clusters = self._clusters
        return clusters.snapshot, self._infos(clusters, range(len(clusters.snapshot)))

    def cluster(self, cluster: int) -> ClusterInfo:
        """One cluster.

        Raises:
            UnknownClusterError: no cluster has this id.
        """
        clusters = self._clusters
        return self._infos(clusters, [_row(clusters.snapshot, cluster)])[0]

    def _build(self, snapshot: ClusterSnapshot) -> _Clusters:
        index = self._index_factory(snapshot.centroids)
        return _Clusters(snapshot, index, self._describe, self._described_from)

    def _key(self, snapshot: ClusterSnapshot, row: int) -> AdapterKey:
        return self._key_of(snapshot, row, self._refined(int(snapshot.ids[row])))

    def _key_of(
        self, snapshot: ClusterSnapshot, row: int | None, refined: Refinement | None = None
    ) -> AdapterKey:
        assert self._hypernetwork is not None, "a snapshot with clusters needs a hypernetwork"
        if row is None:
            return AdapterKey(self._base, self._hypernetwork, cluster=None, version=0)
        cluster = int(snapshot.ids[row])
        if refined is not None:
            return AdapterKey(self._base, self._hypernetwork, cluster, 0, refined.id)
        return AdapterKey(self._base, self._hypernetwork, cluster, int(snapshot.versions[row]))

    def _static(self, snapshot: ClusterSnapshot, similarity: float | None) -> Assignment:
        key = self._key_of(snapshot, None)
        return Assignment(key, similarity=similarity, snapshot_version=snapshot.version)

    def _adapted(self, snapshot: ClusterSnapshot, row: int, similarity: float | None) -> Assignment:
        return Assignment(
            key=self._key(snapshot, row),
            cluster=int(snapshot.ids[row]),
            similarity=similarity,
            snapshot_version=snapshot.version,
            conditioning=snapshot.conditioning_of(row),
        )

    def _infos(self, clusters: _Clusters, rows: Sequence[int]) -> list[ClusterInfo]:
        snapshot = clusters.snapshot
        ids = [int(snapshot.ids[row]) for row in rows]
        refined = [self._refined(id) for id in ids]
        keys = [self._key_of(snapshot, *one) for one in zip(rows, refined, strict=True)]
        return [
            ClusterInfo(
                id=id,
                size=int(snapshot.sizes[row]),
                version=int(snapshot.versions[row]),
                adapter_key=key.id,
                refinement=0 if newest is None else newest.number,
                characteristic_tokens=words,
            )
            for row, id, key, newest, words in zip(
                rows, ids, keys, refined, clusters.words_of(rows), strict=True
            )
        ]


def _row(snapshot: ClusterSnapshot, cluster: int) -> int:
    row = snapshot.row(cluster)
    if row is None:
        raise UnknownClusterError(
            f"there is no cluster {cluster}; name one of the {len(snapshot)} served or 'auto'",
            "adaptation",
        )
    return row


def _no_words(directions: FloatArray) -> list[tuple[str, ...]]:
    return [()] * len(directions)


def _never(_cluster: int) -> None:
    return None
