from __future__ import annotations

from typing import Any

import pytest

from cluster_router.console.board import EXPIRY_S
from cluster_router.console.history import STEP_S, STEPS
from cluster_router.console.reports import (
    EngineReport,
    GeneratorReport,
    LearnerReport,
    Place,
)
from cluster_router.tally import Key

ENGINE = EngineReport(3, 1, 900, 1000, 250, 2, 0.4, 5)


def test_every_replica_is_shown(told: Any) -> None:
    told.board.hear_engine(Place("lm-2", "10.0.0.3"), ENGINE)
    told.board.hear_engine(Place("lm-1", "10.0.0.2"), ENGINE)
    told.served(router="router-2")
    told.served()
    replicas = told.state()["replicas"]
    assert [one["replica"] for one in replicas["engines"]] == ["lm-1", "lm-2"]
    assert (
        replicas["engines"][0] | {"node": "10.0.0.2", "kv_use": 0.4, "waiting": 1}
        == (replicas["engines"][0])
    )
    assert [one["replica"] for one in replicas["routers"]] == ["router-1", "router-2"]
    assert replicas["routers"][0]["in_flight"] == 2


def test_generators_and_the_learner_are_shown(told: Any) -> None:
    told.board.hear_generator(Place("generator-1", "n"), GeneratorReport(12, 1, 2, 10))
    told.board.hear_learner(Place("learner-1", "n"), LearnerReport(300, 0, 1, 1.7e9))
    replicas = told.state()["replicas"]
    [generator], [learner] = replicas["generators"], replicas["learners"]
    assert (generator["generated"], generator["failed"], generator["in_flight"]) == (12, 1, 2)
    assert (generator["replica"], generator["cached"]) == ("generator-1", 10)
    assert (learner["learned"], learner["failing"], learner["published"]) == (300, 1, 1.7e9)
    assert told.state(namespace="shop", bound=True)["replicas"] is None


def test_one_that_falls_silent_vanishes(told: Any) -> None:
    told.board.hear_engine(Place("lm-1", "n"), ENGINE)
    told.now += EXPIRY_S / 2
    told.board.hear_engine(Place("lm-2", "n"), ENGINE)
    told.served()
    told.now += EXPIRY_S / 2 + 1
    replicas = told.state()["replicas"]
    assert [one["replica"] for one in replicas["engines"]] == ["lm-2"]
    assert replicas["engines"][0]["age_s"] == EXPIRY_S / 2 + 1
    told.now += EXPIRY_S
    assert not any(told.state()["replicas"].values())


def test_rates_of_all_routers_together(told: Any) -> None:
    told.served(*[told.end()] * 6)
    told.served(*[told.end(cluster=None)] * 4, router="router-2")
    totals = told.state()["totals"]
    assert totals["requests"] == pytest.approx(10 / 10)  # ten seconds of ten requests
    assert totals["output_tokens"] == pytest.approx(100 / 10)
    assert totals["modes"] == {"cluster": 6, "static": 4, "off": 0}
    assert totals["cached_share"] == 0.4
    assert totals["first_token_s"][0] == pytest.approx(0.2, rel=0.21)


def test_what_was_long_ago_is_forgotten(told: Any) -> None:
    told.served(told.end())
    told.now += STEP_S * (STEPS + 1)
    assert told.state()["totals"]["requests_recent"] == 0
    told.served(told.end())
    series = told.state()["series"]["requests"]
    assert len(series) == STEPS and sum(series) == 0  # the step that has begun is not shown
    told.now += STEP_S
    assert told.state()["series"]["requests"][-1] == pytest.approx(1 / STEP_S)


def test_tables_are_asked_for_once(told: Any) -> None:
    assert told.served(version=1) == [""]
    told.board.hear_table(told.table(version=1))
    assert told.served(version=1) == []
    assert told.served(version=2) == [""]
    told.board.hear_table(told.table(version=2))
    assert told.served(version=1) == []  # a router that is behind
    told.board.hear_table(told.table(version=1))
    assert told.state()["namespaces"] == [{"name": "", "clusters": 2, "version": 2}]
    told.now += 60  # refinements come without a new snapshot
    assert told.served(version=2) == [""]


def test_clusters_come_with_their_traffic(told: Any) -> None:
    told.board.hear_table(told.table())
    told.served(told.end(), told.end(), told.end("other", 3))
    large, small = told.state()["clusters"]
    assert (large["id"], large["size"], large["requests_recent"]) == (3, 100, 2)
    assert large["similarity"] == pytest.approx(0.95, abs=0.01)
    assert (small["id"], small["requests_recent"], small["similarity"]) == (8, 0, None)
    assert small["characteristic_tokens"] == ()


def test_a_cluster_in_detail(told: Any) -> None:
    told.board.hear_table(told.table(sizes={3: 100}))
    told.now += 60
    told.board.hear_table(told.table(version=2, sizes={3: 140, 9: 20}))
    told.served(told.end())
    shown = told.state(cluster=3)["cluster"]
    assert [size for _, size in shown["sizes"]] == [100, 140]
    assert shown["since"] is None  # it was there before the board
    assert sum(shown["similarities"]["counts"]) == 1
    assert told.state(cluster=9)["cluster"]["since"] == 1.7e9 + told.now
    assert told.state(cluster=77)["cluster"] is None
    assert told.state(namespace="other", cluster=3)["cluster"] is None


def test_a_cluster_that_is_gone_is_forgotten(told: Any) -> None:
    told.board.hear_table(told.table(sizes={3: 100}))
    told.board.hear_table(told.table(version=2, sizes={9: 20}))
    assert [one["id"] for one in told.state()["clusters"]] == [9]
    assert not told.board.known("", 3).sizes


def test_all_namespaces_at_once(told: Any) -> None:
    told.board.hear_table(told.table())
    told.board.hear_table(told.table("shop", sizes={10**9: 100, 10**9 + 1: 7}))
    told.served(told.end("shop", 10**9))
    state = told.state(namespace=None)
    assert [(one["namespace"], one["id"]) for one in state["clusters"]] == [
        ("", 3),
        ("shop", 10**9),  # its other one had no traffic: it is the bundle's, and of no one's making
        ("", 8),
    ]
    assert state["totals"]["requests_recent"] == 1
    assert told.state(namespace="shop")["totals"]["requests_recent"] == 1
    assert told.state(namespace="")["totals"]["requests_recent"] == 0


def test_a_bound_viewer_sees_its_own_alone(told: Any) -> None:
    told.board.hear_table(told.table())
    told.board.hear_table(told.table("shop", sizes={10**9: 100}))
    told.board.hear_engine(Place("lm-1", "n"), ENGINE)
    told.served(told.end(), told.end("shop", 10**9))
    state = told.state(namespace="shop", bound=True)
    assert state["namespaces"] == [{"name": "shop", "clusters": 1, "version": 1}]
    assert [one["id"] for one in state["clusters"]] == [10**9]
    assert state["totals"]["requests_recent"] == 1
    assert [one["namespace"] for one in state["top"]] == ["shop"]
    assert state["replicas"] is None
    assert "10.0.0" not in str(state) and "router-1" not in str(state)


def test_what_is_merged_of_all_tenants_is_no_tenants(told: Any) -> None:
    for cluster in range(300):  # more than are kept apart
        told.served(told.end("shop", cluster))
    assert told.state(namespace="", bound=True)["totals"]["requests_recent"] == 0
    assert told.state(namespace="", bound=False)["totals"]["requests_recent"] == 44
    assert told.state(namespace=None)["totals"]["requests_recent"] == 300


def test_memory_is_bounded(told: Any) -> None:
    for number in range(200):
        told.board.hear_table(told.table(f"tenant-{number}"))
        told.now += STEP_S
        told.served(told.end(f"tenant-{number}"))
    assert len(told.board.tables) == 65
    assert len(told.board.history.steps(told.now, lambda _: True)) == STEPS
    held: Any = told.board.history.by_key(told.now, 1e9, lambda key: isinstance(key, Key))
    assert len(held) == STEPS
