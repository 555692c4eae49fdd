"""TenantLearners: one CentroidLearner for each namespace, which share nothing."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

from cluster_router.files import Folder
from cluster_router.learner import CentroidLearner
from cluster_router.learning.config import LearnerConfig
from cluster_router.snapshots import Checkpoint, SnapshotStore
from cluster_router.wire.errors import OverloadedError, SetupError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import DEFAULT_NAMESPACE, FloatArray

_BLOCK = 10**9
_FOLDER = re.compile(r"(\d+)-([0-9a-f]{32})")
_CLAIM = "claimed"  # file that makes a folder appear, also in an object store
_TRIES = 8


@dataclass(eq=False)
class _Tenant:
    learner: CentroidLearner
    store: SnapshotStore | None  # None until it has a block of ids, at the first publishing
    saved: int  # version of the last snapshot that the store holds


@dataclass(frozen=True, eq=False)
class _Home:
    """Where a namespace's clusters are, and the newest version there."""

    store: SnapshotStore
    block: int
    version: int


class TenantLearners:
    """Keeps tenants apart by construction: each namespace has its own learner, folder and ids.

    Ids of different namespaces come from different blocks of 10^9, so neither a cluster id nor an
    adapter key ever means something in two of them. The default namespace keeps the bundle's ids.
    Folders are named by block and a digest of the namespace, which so cannot be a path. A block is
    chosen when a namespace is first published, so that learners that share a folder choose apart.

    Args:
        start: the bundle's clusters, from which every namespace begins.
        uri: folder or URI for the snapshots; see SnapshotStore.
        config: the settings of every learner.
        max_namespaces: how many may learn beside the default one, to bound memory and files.
        keep: snapshots kept of each.
    """

    def __init__(
        self,
        start: ClusterSnapshot,
        uri: str,
        config: LearnerConfig | None = None,
        max_namespaces: int = 64,
        keep: int = 3,
    ) -> None:
        self._start = start
        self._uri = uri.rstrip("/")
        self._config = config or LearnerConfig()
        self._max = max_namespaces
        self._keep = keep
        self._tenants: dict[str, _Tenant] = {}

    def learn(self, namespace: str, embeddings: FloatArray) -> None:
        """Learn from prompts [N, d] of one namespace, oldest first.

        Raises:
            RequestError: see CentroidLearner.learn.
            OverloadedError: it would be one namespace too many.
            SetupError: what was published of the namespace cannot be read.
        """
        self._tenant(namespace).learner.learn(embeddings)

    def publish(self, namespace: str = DEFAULT_NAMESPACE) -> ClusterSnapshot:
        """Save what a namespace has learned, then return it: what routers see is always durable.

        Raises:
            SetupError: it cannot be saved. Nothing is lost: the next call tries again. Only where
                another learner has published meanwhile, its clusters take the place of ours.
        """
        tenant = self._tenant(namespace)
        home = _home(self._uri, namespace, self._keep)
        if home is not None and home.version > tenant.saved:
            del self._tenants[namespace]
            raise SetupError(
                f"another learner publishes under {self._uri}; give each service its own folder"
            )
        if tenant.store is None:
            block = _claim(self._uri, _digest(namespace))
            tenant.learner.renumber(block * _BLOCK)
            tenant.store = _store(self._uri, block, _digest(namespace), self._keep)
        snapshot = tenant.learner.snapshot()
        if snapshot.version > tenant.saved:
            tenant.store.save(Checkpoint(snapshot, tenant.learner.state()))
            tenant.saved = snapshot.version
        return snapshot

    def namespaces(self) -> list[str]:
        """Namespaces that have learned since the start."""
        return list(self._tenants)

    def _tenant(self, namespace: str) -> _Tenant:
        if namespace not in self._tenants:
            others = sum(name != DEFAULT_NAMESPACE for name in self._tenants)
            if namespace != DEFAULT_NAMESPACE and others >= self._max:
                raise OverloadedError(
                    f"{self._max} namespaces learn already; raise max_namespaces", "namespace"
                )
            self._tenants[namespace] = self._open(namespace)
        return self._tenants[namespace]

    def _open(self, namespace: str) -> _Tenant:
        home = _home(self._uri, namespace, self._keep)
        checkpoint = None if home is None else home.store.load()
        if home is not None and checkpoint is not None:
            # A newer one that is damaged now may have been served: what its version named is taken.
            version = max(home.version, checkpoint.snapshot.version)
            snapshot, state = replace(checkpoint.snapshot, version=version), checkpoint.state
            first = home.block * _BLOCK
            return _Tenant(
                CentroidLearner(snapshot, self._config, state or None, first), home.store, version
            )
        store = None
        if namespace == DEFAULT_NAMESPACE:
            store = _store(self._uri, 0, _digest(namespace), self._keep)
        return _Tenant(CentroidLearner(self._start, self._config), store, self._start.version)


def reader(uri: str, namespace: str = DEFAULT_NAMESPACE, keep: int = 3) -> SnapshotStore | None:
    """The store of a namespace under `uri`; None while nothing of it has been published."""
    home = _home(uri.rstrip("/"), namespace, keep)
    return None if home is None else home.store


def newer(uri: str, namespace: str, version: int) -> ClusterSnapshot | None:
    """What was last published for a namespace under `uri`, if that is newer than `version`.

    Raises:
        BundleError: all that was published is damaged.
        SetupError: it cannot be listed.
    """
    home = _home(uri.rstrip("/"), namespace)
    if home is None or home.version <= version:
        return None
    checkpoint = home.store.load()
    fresh = checkpoint is not None and checkpoint.snapshot.version > version
    return checkpoint.snapshot if checkpoint is not None and fresh else None


def _home(uri: str, namespace: str, keep: int = 3) -> _Home | None:
    """Where learner and routers find a namespace; None while nothing of it has been published.

    Two learners may once have given it a folder each: the one with the newer version counts, of
    equals the one with the smaller block.
    """
    digest = _digest(namespace)
    homes = []
    for block, owner in _folders(uri):
        if owner == digest:
            store = _store(uri, block, digest, keep)
            version = store.latest_version()
            if version is not None:
                homes.append(_Home(store, block, version))
    return max(homes, key=lambda home: (home.version, -home.block), default=None)


def _claim(uri: str, digest: str) -> int:
    """A block of ids that no other namespace has or gets.

    A learner first makes its folder, then looks for another of the same block. So of two that
    choose the same one at the same moment, at least the later sees the earlier and goes on to the
    next. What it leaves behind holds no snapshot, and nobody reads it.

    Raises:
        SetupError: the folder cannot be made or listed, or others were always there as well.
    """
    for _ in range(_TRIES):
        taken, mine = _blocks(uri, digest)
        block = min(mine - taken, default=max(taken | mine) + 1)
        Folder(f"{uri}/{block}-{digest}").write(_CLAIM, b"")
        taken, _ = _blocks(uri, digest)
        if block not in taken:
            return block
    raise SetupError(f"other learners begin namespaces under {uri} all the time; try again")


def _blocks(uri: str, digest: str) -> tuple[set[int], set[int]]:
    """Blocks that other namespaces than that of `digest` have, 0 among them, and its own."""
    folders = _folders(uri)
    others = {block for block, owner in folders if owner != digest}
    return others | {0}, {block for block, owner in folders if owner == digest}


def _folders(uri: str) -> list[tuple[int, str]]:
    """Block and digest of the namespace, of each folder under `uri`."""
    folders = map(_FOLDER.fullmatch, Folder(uri).names())
    return [(int(match[1]), match[2]) for match in folders if match]


def _store(uri: str, block: int, digest: str, keep: int) -> SnapshotStore:
    return SnapshotStore(f"{uri}/{block}-{digest}", keep)


def _digest(namespace: str) -> str:
    return hashlib.sha256(namespace.encode()).hexdigest()[:32]
