"""Serve's request router, with stand-ins for replicas. tests/serve has real ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID

from cluster_router.affinity import AffinityPolicy
from deploy.affinity import (
    BASE,
    HANDOVER_S,
    MAX_REPORTED,
    RESIDENT,
    ClusterAffinityRouter,
    routing_stats,
)
from deploy.app import build
from deploy.config import AppConfig

DEPLOYMENT = DeploymentID(name="LMReplica", app_name="test")


@dataclass
class Replica:
    """As much of a RunningReplica as routing looks at."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict)
    ongoing: int = 0
    max_ongoing_requests: int = 100

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(unique_id=self.name, deployment_id=DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return self.ongoing


@pytest.fixture
def replicas() -> list[Replica]:
    return [Replica(name) for name in ("a", "b", "c")]


@pytest.fixture
async def router(replicas: list[Replica]) -> ClusterAffinityRouter:
    one = ClusterAffinityRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
    )
    one.initialize_state(**AffinityPolicy().model_dump())
    one.update_replicas(replicas)
    return one


def pending(key: str, **named: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id="r", internal_request_id="i", session_id=key)
    return PendingRequest(args=[], kwargs=named, metadata=metadata)


async def choose(router: ClusterAffinityRouter, key: str) -> list[list[str]]:
    replicas = list(router.curr_replicas.values())
    tiers = await router.choose_replicas(replicas, pending(key))
    return [[one.name for one in tier] for tier in tiers]


async def test_a_replica_that_reports_the_update_comes_first(
    router: ClusterAffinityRouter, replicas: list[Replica]
) -> None:
    for holder in replicas:
        for one in replicas:
            one.routing_stats = routing_stats(["x", "y"] if one is holder else ["y", "z"])
        router.update_replicas(replicas)
        assert (await choose(router, "x"))[0] == [holder.name]
        router._residency = type(router._residency)(memory_s=5)  # forget what was just sent


async def test_a_cold_update_stays_where_its_first_request_went(
    router: ClusterAffinityRouter, replicas: list[Replica]
) -> None:
    [first] = (await choose(router, "cold"))[0]
    for other in ("p", "q", "r", "s"):
        await choose(router, other)
    assert (await choose(router, "cold"))[0] == [first]
    router.update_replicas(replicas)  # a report from before that request
    assert (await choose(router, "cold"))[0] == [first]


async def test_an_overrun_replica_gives_way(
    router: ClusterAffinityRouter, replicas: list[Replica]
) -> None:
    [first] = (await choose(router, "hot"))[0]
    for one in replicas:
        router.on_new_queue_len_info(one.replica_id, 20 if one.name == first else 1)
    tiers = await choose(router, "hot")
    assert tiers[-1] == [first] and len(tiers) == 3
    assert sorted(len(tier) for tier in await choose(router, "hot")) == [1, 1, 1]


async def test_unadapted_requests_go_by_load(
    router: ClusterAffinityRouter, replicas: list[Replica]
) -> None:
    for load, one in zip((3, 1, 2), replicas, strict=True):
        router.on_new_queue_len_info(one.replica_id, load)
    assert await choose(router, "") == [["b", "c", "a"]]
    assert router._residency.of("b") == set()


async def test_requests_of_a_base_model_wait_for_its_replicas(
    router: ClusterAffinityRouter, replicas: list[Replica]
) -> None:
    async def chosen(request: PendingRequest) -> set[str]:
        tiers = await router.choose_replicas(list(router.curr_replicas.values()), request)
        return {one.name for tier in tiers for one in tier}

    for one, base in zip(replicas, ("old", "new", None), strict=True):
        one.routing_stats = routing_stats([]) | ({} if base is None else {BASE: base})
    router.update_replicas(replicas)
    for key in ("", "x"):
        assert await chosen(pending(key, base="old")) == {"a", "c"}, "c has not said which it is of"
        assert await chosen(pending(key, base="new")) == {"b", "c"}
        assert await chosen(pending(key)) == {"a", "b", "c"}
    router.update_replicas(replicas[:1])
    request = pending("x", base="new")
    assert await chosen(request) == set()
    request.created_at -= HANDOVER_S + 1
    assert await chosen(request) == {"a"}, "which will say what is wrong"


def test_a_report_keeps_the_most_recent() -> None:
    held = [f"{number:04}" for number in range(MAX_REPORTED + 10)]
    assert routing_stats(held) == {RESIDENT: held[10:]}
    assert routing_stats(["b", "a"]) == routing_stats(["a", "b"])  # so Serve sees no change


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="soft_cup"):
        AppConfig.model_validate({"routing": {"soft_cup": 2}})


def test_the_application_routes_lm_replicas_and_generators_by_affinity() -> None:
    router = build(AppConfig.model_validate({"routing": {"slack": 9}}))._bound_deployment
    for bound in router.init_args[1:3]:
        config = bound._bound_deployment._deployment_config.request_router_config
        assert config.get_request_router_class().__name__ == "ClusterAffinityRouter"
        assert config.request_router_kwargs["slack"] == 9
        assert config.request_routing_stats_period_s < 1
