"""Documents as a stream: what is known of a document's cluster at the moment it arrives.

A plan is made of embeddings alone, before any model runs: for every document, the clusters formed
from contexts that arrived earlier, and the refinements these clusters had by then. Each refinement
names the earlier contexts it learns from, so that nothing of a later document, and nothing of any
document's scored part, can reach it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster_router.embedding import TokenEmbedder
from cluster_router.learner import CentroidLearner
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import Conditioning, FloatArray
from training.clusters import NO_CLUSTER, IntArray, embed_contexts, nearest
from training.data import Window
from training.evaluation.groups import Group
from training.evaluation.settings import StreamSettings

NOBODY = -1
"""Id of no cluster."""


@dataclass(frozen=True, eq=False)
class Common:
    """What all arrivals so far have in common, to be learned from their contexts.

    Attributes:
        prompts: arrivals whose contexts are learned from, oldest first: the latest.
        seen: how many had arrived.
        before: what it starts from; None starts from nothing.
    """

    prompts: tuple[int, ...]
    seen: int
    before: Common | None


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Documents in the order they arrive.

    Attributes:
        windows: of each.
        embeddings: float32 [N, d], of their contexts.
        scored: int64 [N], position in the group's windows, or -1 for warm-up traffic.
    """

    windows: Sequence[Window]
    embeddings: FloatArray
    scored: IntArray

    @classmethod
    def of(
        cls, group: Group, embedder: TokenEmbedder, settings: StreamSettings, seed: int
    ) -> Arrivals:
        """All domains interleaved at random; warm-up traffic first or in between."""
        windows = [*group.warmup, *group.windows]
        first = len(group.warmup)
        random = np.random.default_rng([seed, 1])
        if settings.warmup == "first":
            order = [*random.permutation(first), *(first + random.permutation(len(group.windows)))]
        else:
            order = list(random.permutation(len(windows)))
        chosen = [windows[i] for i in order]
        scored = np.array([max(i - first, -1) for i in order], np.int64)
        return cls(chosen, embed_contexts(chosen, embedder), scored)

    def __len__(self) -> int:
        return len(self.windows)


@dataclass(frozen=True, eq=False)
class Refinement:
    """Cores of a cluster to be learned from some of its earlier contexts.

    Attributes:
        cluster: its id.
        prompts: arrivals whose contexts are learned from, oldest first: the cluster's latest.
        seen: how many contexts of the cluster had arrived.
        conditioning: what the hypernetwork is given. A refinement starts from what it makes of
            that, and from what was common by then.
        common: that; None for nothing.
        before: the cluster's refinement that this one replaces.
    """

    cluster: int
    prompts: tuple[int, ...]
    seen: int
    conditioning: Conditioning
    common: Common | None
    before: Refinement | None

    def within(self, support: int) -> Refinement | None:
        """The newest that had seen at most `support` contexts."""
        found: Refinement | None = self
        while found is not None and found.seen > support:
            found = found.before
        return found


@dataclass(frozen=True, eq=False)
class Published:
    """What is known after some arrivals.

    Attributes:
        snapshot: the clusters.
        members: earlier arrivals of each cluster, by id, oldest first.
        refinements: the newest of each cluster that has any, by id.
        common: what the arrivals have in common, None for nothing.
    """

    snapshot: ClusterSnapshot
    members: Mapping[int, tuple[int, ...]]
    refinements: Mapping[int, Refinement]
    common: Common | None


@dataclass(frozen=True, eq=False)
class Moment:
    """One arrival and what was known by then.

    Attributes:
        time: its place among all arrivals.
        known: made of earlier arrivals only.
        cluster: id of the cluster it was assigned to, or NOBODY.
        similarity: to the nearest centroid; -1 where there is none.
    """

    time: int
    known: Published
    cluster: int
    similarity: float

    @property
    def support(self) -> tuple[int, ...]:
        """Earlier arrivals of its cluster, oldest first."""
        return self.known.members.get(self.cluster, ())

    @property
    def refinement(self) -> Refinement | None:
        """The refinement it is served under, if its cluster has any."""
        return self.known.refinements.get(self.cluster)

    def conditioning(self, cluster: int) -> Conditioning | None:
        """What the hypernetwork is given for a cluster, None where it is not known."""
        row = self.known.snapshot.row(cluster)
        return None if row is None else self.known.snapshot.conditioning_of(row)


@dataclass(frozen=True, eq=False)
class Plan:
    """Every arrival of a stream, and the moment of each."""

    arrivals: Arrivals
    moments: Sequence[Moment]

    def of_windows(self, count: int) -> list[Moment]:
        """The moments of the group's `count` windows, in the group's order."""
        found: list[Moment | None] = [None] * count
        for moment in self.moments:
            index = int(self.arrivals.scored[moment.time])
            if index >= 0:
                found[index] = moment
        return [moment for moment in found if moment is not None]

    def support_of(self, moment: Moment) -> list[Window]:
        """Earlier arrivals of the cluster of a moment."""
        return self.contexts(moment.support)

    def contexts(self, times: Sequence[int]) -> list[Window]:
        """The arrivals at `times`; of each only the context may be used."""
        return [self.arrivals.windows[time] for time in times]


def plan_stream(
    arrivals: Arrivals,
    start: ClusterSnapshot,
    settings: StreamSettings,
    labels: Sequence[int] | None = None,
) -> Plan:
    """Let documents arrive one after the other.

    Args:
        arrivals: the documents.
        start: the bundle's clusters.
        settings: of the stream.
        labels: cluster id of each arrival, in place of the nearest cluster: for the control in
            which the partition is random.
    """
    if settings.start == "empty":
        start = ClusterSnapshot.empty(start.dim)
    planner = _Planner(arrivals, start, settings, labels)
    moments = []
    for time in range(len(arrivals)):
        if time % settings.publish_every == 0:
            planner.publish(time)
        moments.append(planner.moment(time))
        planner.learn(time)
    return Plan(arrivals, moments)


def random_labels(plan: Plan, seed: int) -> list[int]:
    """The clusters of the arrivals dealt out anew: as many to each cluster, no reason which."""
    labels = np.array([moment.cluster for moment in plan.moments])
    assigned = np.flatnonzero(labels != NOBODY)
    random = np.random.default_rng([seed, 2])
    labels[assigned] = labels[random.permutation(assigned)]
    return [int(label) for label in labels]


class _Planner:
    def __init__(
        self,
        arrivals: Arrivals,
        start: ClusterSnapshot,
        settings: StreamSettings,
        labels: Sequence[int] | None,
    ) -> None:
        self._arrivals = arrivals
        self._settings = settings
        self._labels = labels
        self._learner = CentroidLearner(start, settings.learner)
        self._learned: dict[int, set[int]] = defaultdict(set)
        self._known = Published(start, {}, {}, None)

    def learn(self, time: int) -> None:
        self._learner.learn(self._arrivals.embeddings[time : time + 1])

    def publish(self, time: int) -> None:
        """Form the clusters of what arrived before `time`, and refine those that have grown."""
        snapshot = self._learner.snapshot()
        if self._labels is None:
            _, ids = _assign(self._arrivals.embeddings[:time], snapshot)
        else:
            ids = list(self._labels[:time])
        members: dict[int, list[int]] = defaultdict(list)
        for earlier, cluster in enumerate(ids):
            members[cluster].append(earlier)
        members.pop(NOBODY, None)
        held = {cluster: tuple(found) for cluster, found in members.items()}
        common = self._learn_common(time)
        before = self._known.refinements
        refinements = {
            cluster: refinement
            for cluster, found in held.items()
            if (refinement := self._refine(snapshot, cluster, found, before.get(cluster), common))
        }
        self._known = Published(snapshot, held, refinements, common)

    def moment(self, time: int) -> Moment:
        """What is known of the arrival at `time`."""
        similarities, ids = _assign(
            self._arrivals.embeddings[time : time + 1], self._known.snapshot
        )
        cluster = ids[0] if self._labels is None else self._labels[time]
        return Moment(time, self._known, cluster, float(similarities[0]))

    def _learn_common(self, time: int) -> Common | None:
        """What is new in common if enough arrivals are new, else what was."""
        before, config = self._known.common, self._settings.common
        seen = 0 if before is None else before.seen
        if time - seen < max(config.every, min(seen, config.buffer)):
            return before
        return Common(tuple(range(max(0, time - config.buffer), time)), time, before)

    def _refine(
        self,
        snapshot: ClusterSnapshot,
        cluster: int,
        members: tuple[int, ...],
        before: Refinement | None,
        common: Common | None,
    ) -> Refinement | None:
        """A new refinement if enough members or what is common are new, else the one before."""
        learned, row = self._learned[cluster], snapshot.row(cluster)
        due = max(self._settings.refine_every, len(learned))
        grown = len(set(members) - learned) >= due
        moved = before is not None and before.common is not common
        if row is None or not (grown or moved):
            return before
        learned.update(members)
        prompts = members[-self._settings.buffer :]
        conditioning = snapshot.conditioning_of(row)
        return Refinement(cluster, prompts, len(learned), conditioning, common, before)


def _assign(embeddings: FloatArray, snapshot: ClusterSnapshot) -> tuple[FloatArray, list[int]]:
    """Similarity to the nearest centroid, and id of that cluster or NOBODY, of each embedding."""
    if len(snapshot) == 0 or len(embeddings) == 0:
        return np.full(len(embeddings), -1, np.float32), [NOBODY] * len(embeddings)
    similarities, rows = nearest(snapshot.project(embeddings), snapshot.centroids)
    near = np.where(similarities >= snapshot.threshold, rows, NO_CLUSTER)
    ids = [NOBODY if row == NO_CLUSTER else int(snapshot.ids[row]) for row in near]
    return similarities, ids
