"""Serve's request router for cluster affinity: a thin shell around cluster_router/affinity.py.

The key of a request is its handle's `session_id`; what a replica holds comes from the
`record_routing_stats` of its class, as `{RESIDENT: [ids]}`. A request that names its base model
(the argument `base`) goes to replicas of that one: while an application's model is being replaced,
tokens of one model must not be read by the other.

`ray.serve.request_router` is an alpha API (read in Ray 2.60): what depends on it is all here.
Serve pickles this module by value, so nothing in it may have state of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from cluster_router.affinity import AffinityPolicy, Candidate, Residency, rank

RESIDENT = "resident"
BASE = "base"
MAX_REPORTED = 512
"""Ids in one report, since every router receives it whenever it changes."""

REPORT_PERIOD_S = 0.5

HANDOVER_S = 120.0
"""How long a request waits for a replica of its base model, where there are others alone."""


class ClusterAffinityRouter(FIFOMixin, RequestRouter):
    """Chooses among replicas by `rank`, with what this process knows of their load.

    First come, first served: Serve's other way tells pending calls apart by the id of the HTTP
    request they are made for, and so loses all but one of those that `n` choices make at once.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the policy's settings.

        Raises:
            pydantic.ValidationError: one is unknown or out of range.
        """
        self._policy = AffinityPolicy.model_validate(kwargs)
        self._residency = Residency(self._policy.memory_s)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas come or go, or report something new."""
        self._residency.report(
            {_name(one): (one.routing_stats or {}).get(RESIDENT, ()) for one in replicas}
        )
        super().update_replicas(replicas)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Tiers of replicas; Serve takes the least loaded of the first tier that has room."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # all tiers are given at once
        key = pending_request.metadata.session_id or None
        # Shuffled, so that an idle service does not send everything unadapted to one replica.
        fitting = _of_its_base(candidate_replicas, pending_request)
        replicas = random.sample(fitting, len(fitting))
        by_name = {_name(one): one for one in replicas}
        tiers = rank(key, [self._candidate(one) for one in replicas], self._policy)
        if key is not None and tiers:
            # Noted now and not when the replica accepts, a round trip later: requests of the same
            # cold cluster that come in between follow this one.
            self._residency.send(tiers[0][0], key)
        return [[by_name[name] for name in tier] for tier in tiers]

    def _candidate(self, replica: RunningReplica) -> Candidate:
        # Serve forgets a load it has not heard of for ten seconds, and asks when it counts.
        load = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Candidate(_name(replica), load, self._residency.of(_name(replica)))


def _of_its_base(replicas: list[RunningReplica], request: PendingRequest) -> list[RunningReplica]:
    """Replicas that serve the base model of `request`, or have not said which they serve.

    All of them once it has waited long enough: they then say what is wrong.
    """
    base = request.kwargs.get(BASE)
    fitting = [one for one in replicas if (one.routing_stats or {}).get(BASE, base) == base]
    late = time.time() - request.created_at > HANDOVER_S
    if base is None or (late and not fitting):
        return replicas
    return fitting


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def routing_stats(resident: Collection[str]) -> dict[str, list[str]]:
    """What a replica's `record_routing_stats` returns; the last ids are the ones kept."""
    return {RESIDENT: sorted(list(resident)[-MAX_REPORTED:])}


def router_config(policy: AffinityPolicy) -> RequestRouterConfig:
    """What binds a deployment to this router."""
    return RequestRouterConfig(
        request_router_class=f"{__name__}:{ClusterAffinityRouter.__name__}",
        request_router_kwargs=policy.model_dump(),
        request_routing_stats_period_s=REPORT_PERIOD_S,
    )
