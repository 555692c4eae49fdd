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


@dataclass(eq=False)
class _Tenant:
    learner: CentroidLearner
    store: SnapshotStore
    saved: int  # version of the last snapshot that the store holds


class TenantLearners:
    """Keeps tenants apart by construction: each namespace has its own learner, folder and ids.

    Ids of different namespaces come from different blocks of 10^9, so neither a cluster id nor an
    adapter key ever means something in two of them. The default namespace keeps the bundle's ids.
    Folders are named by block and a digest of the namespace, which so cannot be a path.

    Args:
        start: the bundle's clusters, from which every namespace begins.
        uri: folder or URI for the snapshots; see SnapshotStore.
        config: the settings of every learner.
        max_namespaces: how many may learn, to bound memory and files.
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
        self._blocks = _blocks_in(self._uri)
        self._blocks.setdefault(_digest(DEFAULT_NAMESPACE), 0)

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
        if (tenant.store.latest_version() or 0) > tenant.saved:
            del self._tenants[namespace]
            raise SetupError(
                f"another learner publishes under {self._uri}; give each service its own folder"
            )
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
            if len(self._tenants) >= self._max:
                raise OverloadedError(
                    f"{self._max} namespaces learn already; raise max_namespaces", "namespace"
                )
            self._tenants[namespace] = self._open(namespace)
        return self._tenants[namespace]

    def _open(self, namespace: str) -> _Tenant:
        digest = _digest(namespace)
        block = self._blocks.setdefault(digest, max(self._blocks.values()) + 1)
        first = block * _BLOCK
        store = SnapshotStore(f"{self._uri}/{block}-{digest}", self._keep)
        checkpoint = store.load()
        if checkpoint is not None:
            # A newer one that is damaged now may have been served: what its version named is taken.
            version = max(store.latest_version() or 0, checkpoint.snapshot.version)
            snapshot, state = replace(checkpoint.snapshot, version=version), checkpoint.state
            return _Tenant(
                CentroidLearner(snapshot, self._config, state or None, first), store, version
            )
        start = replace(self._start, ids=self._start.ids + first)
        return _Tenant(CentroidLearner(start, self._config, None, first), store, start.version)


def reader(uri: str, namespace: str = DEFAULT_NAMESPACE, keep: int = 3) -> SnapshotStore | None:
    """The store of a namespace under `uri`; None while nothing of it has been published."""
    uri = uri.rstrip("/")
    block = _blocks_in(uri).get(_digest(namespace))
    return None if block is None else SnapshotStore(f"{uri}/{block}-{_digest(namespace)}", keep)


def newer(uri: str, namespace: str, version: int) -> ClusterSnapshot | None:
    """What was last published for a namespace under `uri`, if that is newer than `version`.

    Raises:
        BundleError: all that was published is damaged.
        SetupError: it cannot be listed.
    """
    store = reader(uri, namespace)
    if store is None or (store.latest_version() or 0) <= version:
        return None
    checkpoint = store.load()
    fresh = checkpoint is not None and checkpoint.snapshot.version > version
    return checkpoint.snapshot if checkpoint is not None and fresh else None


def _blocks_in(uri: str) -> dict[str, int]:
    folders = map(_FOLDER.fullmatch, Folder(uri).names())
    return {match[2]: int(match[1]) for match in folders if match}


def _digest(namespace: str) -> str:
    return hashlib.sha256(namespace.encode()).hexdigest()[:32]
