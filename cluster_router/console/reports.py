"""What replicas tell the board of themselves. Of prompts there are counts, and no text."""

from __future__ import annotations

from dataclasses import dataclass

from cluster_router.console.counts import Numbers
from cluster_router.console.increments import Increment
from cluster_router.wire.types import ClusterInfo


@dataclass(frozen=True, slots=True)
class Place:
    """Who tells: a replica, and the address of its node."""

    replica: str
    node: str


@dataclass(frozen=True, slots=True)
class EngineReport:
    """An LM replica at one moment.

    Attributes:
        running, waiting: requests.
        tokens_ahead: tokens of all these that are not computed yet.
        prompt_tokens, cached_tokens: since the replica started.
        preemptions: how often a request had to make room, since then.
        kv_use: share of the KV cache that running requests use.
        updates: clusters' updates at hand.
    """

    running: int
    waiting: int
    tokens_ahead: int
    prompt_tokens: int
    cached_tokens: int
    preemptions: int
    kv_use: float
    updates: int


@dataclass(frozen=True, slots=True)
class GeneratorReport:
    """An adapter generator at one moment.

    Attributes:
        generated, failed: updates since the replica started.
        in_flight: updates being generated, or waiting to be.
        cached: updates at hand.
    """

    generated: int
    failed: int
    in_flight: int
    cached: int


@dataclass(frozen=True, slots=True)
class LearnerReport:
    """The learner at one moment.

    Attributes:
        learned, refused: prompts since it started, those that it could not learn from apart.
        failing: namespaces that cannot be published.
        published: Unix time of the latest new snapshot; None if there was none.
    """

    learned: int
    refused: int
    failing: int
    published: float | None


@dataclass(frozen=True, slots=True, eq=False)
class ClusterTable:
    """The clusters of a namespace, and where they lie on the map.

    Attributes:
        version: of the snapshot they are from.
        clusters: what callers see of them.
        points: x and y of each, [K, 2].
    """

    namespace: str
    version: int
    clusters: tuple[ClusterInfo, ...]
    points: Numbers


@dataclass(frozen=True, slots=True, eq=False)
class RouterReport:
    """A router since its last report.

    Attributes:
        served: the requests since then.
        versions: of the snapshots it holds, by namespace.
    """

    served: Increment
    versions: dict[str, int]
