from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster_router.affinity import AffinityPolicy, Candidate, Residency, rank, rendezvous

POLICY = AffinityPolicy()
KEYS = [f"{number:016x}" for number in range(24)]

names = st.lists(st.text("abcdef0123456789", min_size=1, max_size=8), unique=True, max_size=8)
policies = st.builds(
    AffinityPolicy, soft_cap=st.floats(1, 4), slack=st.floats(0, 16), memory_s=st.just(5)
)


@st.composite
def fleets(draw: st.DrawFn) -> list[Candidate]:
    held = st.frozensets(st.sampled_from(KEYS))
    return [Candidate(name, draw(st.integers(0, 40)), draw(held)) for name in draw(names)]


def order(tiers: list[list[str]]) -> list[str]:
    return [name for tier in tiers for name in tier]


@given(st.sampled_from([None, *KEYS]), fleets(), policies)
def test_every_candidate_appears_exactly_once(
    key: str | None, fleet: list[Candidate], policy: AffinityPolicy
) -> None:
    tiers = rank(key, fleet, policy)
    assert all(tiers)
    assert sorted(order(tiers)) == sorted(one.name for one in fleet)


@given(st.sampled_from(KEYS), fleets(), policies)
def test_warm_before_cold_and_both_before_those_above_the_cap(
    key: str, fleet: list[Candidate], policy: AffinityPolicy
) -> None:
    cap = (sum(one.load for one in fleet) + 1) / max(1, len(fleet))
    cap = max(policy.soft_cap * cap, cap + policy.slack)
    places = {one.name: (one.load >= cap, key not in one.resident) for one in fleet}
    found = [places[name] for name in order(rank(key, fleet, policy))]
    above = [place for place in found if place[0]]
    assert found[: len(found) - len(above)] == sorted(place for place in found if not place[0])
    if fleet:
        assert not found[0][0], "the least loaded replica is never above the cap"


@given(fleets())
def test_without_a_key_the_least_loaded_comes_first(fleet: list[Candidate]) -> None:
    loads = {one.name: one.load for one in fleet}
    found = [loads[name] for name in order(rank(None, fleet, POLICY))]
    assert found == sorted(found)


@given(st.sampled_from(KEYS), names, st.data())
def test_a_replica_that_leaves_does_not_reorder_the_others(
    key: str, fleet: list[str], data: st.DataObject
) -> None:
    before = rendezvous(key, fleet)
    assert before == rendezvous(key, reversed(fleet))
    if fleet:
        gone = data.draw(st.sampled_from(fleet))
        before.remove(gone)
        assert rendezvous(key, [name for name in fleet if name != gone]) == before


def test_rendezvous_spreads_keys_evenly() -> None:
    fleet = ["a", "b", "c"]
    first = [rendezvous(f"key {number}", fleet)[0] for number in range(3000)]
    assert all(900 < first.count(name) < 1100 for name in fleet)


def test_the_least_loaded_warm_replica_is_first_in_its_tier() -> None:
    key = KEYS[0]
    fleet = [Candidate("a", 5, {key}), Candidate("b", 3, {key}), Candidate("c", 0, ())]
    assert rank(key, fleet, POLICY) == [["b", "a"], ["c"]]


def test_a_hot_cluster_fans_out_to_the_next_in_rendezvous_order() -> None:
    key = KEYS[0]
    first, second, third = rendezvous(key, ["a", "b", "c"])

    def fleet(load: int) -> list[Candidate]:
        return [Candidate(first, load, {key}), Candidate(second, 4, ()), Candidate(third, 4, ())]

    assert rank(key, fleet(10), POLICY)[0] == [first]
    assert rank(key, fleet(11), POLICY) == [[second], [third], [first]]


def test_a_cold_cluster_goes_where_there_are_fewer_updates() -> None:
    key = KEYS[0]
    first, second = rendezvous(key, ["a", "b"])
    held = set(KEYS[1:6])
    assert rank(key, [Candidate(first, 0, held), Candidate(second, 0, held)], POLICY)[0] == [first]
    assert rank(key, [Candidate(first, 0, held), Candidate(second, 0, ())], POLICY)[0] == [second]


def test_what_was_sent_counts_until_a_report_must_have_said_it() -> None:
    now = [100.0]
    residency = Residency(memory_s=5, clock=lambda: now[0])
    residency.report({"a": ["x"], "b": []})
    residency.send("b", "y")
    assert set(residency.of("a")) == {"x"} and set(residency.of("b")) == {"y"}
    now[0] += 1
    residency.report({"a": ["x"], "b": []})  # on its way since before the request was sent
    assert set(residency.of("b")) == {"y"}
    now[0] += 5
    residency.report({"a": [], "b": ["z"]})
    assert set(residency.of("a")) == set() and set(residency.of("b")) == {"z"}
    residency.report({"b": ["z"]})
    assert set(residency.of("a")) == set()


@pytest.mark.parametrize("wrong", [{"soft_cap": 0.9}, {"slack": -1}, {"softcap": 2}])
def test_settings_that_do_not_exist_or_fit_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        AffinityPolicy.model_validate(wrong)


@dataclass
class Outcome:
    loads: int
    shares: list[float]


def simulate(seed: int, requests: int, clients: int, replicas: int = 3) -> Outcome:
    """Clients that send their next request when their last has ended; reports a second late."""
    rng = random.Random(seed)
    fleet = [f"{rng.getrandbits(32):08x}" for _ in range(replicas)]
    stream = iter(rng.choices(KEYS, [1 / place for place in range(1, len(KEYS) + 1)], k=requests))
    now = 0.0
    residency = Residency(POLICY.memory_s, clock=lambda: now)
    residency.report(dict.fromkeys(fleet, ()))
    load, served = dict.fromkeys(fleet, 0), dict.fromkeys(fleet, 0)
    held: dict[str, set[str]] = {name: set() for name in fleet}
    events: list[tuple[float, int, str]] = []
    reports: list[tuple[float, dict[str, list[str]]]] = []
    loads = 0

    def send(key: str) -> None:
        nonlocal loads
        fleet_now = [Candidate(name, load[name], residency.of(name)) for name in fleet]
        # As Serve does: the least loaded of the first tier.
        chosen = min(rank(key, fleet_now, POLICY)[0], key=lambda name: load[name])
        residency.send(chosen, key)
        loads += key not in held[chosen]
        held[chosen].add(key)
        load[chosen] += 1
        served[chosen] += 1
        seconds = rng.uniform(0.15, 0.45) * (1 + 0.1 * load[chosen])
        heapq.heappush(events, (now + seconds, served[chosen], chosen))

    for _ in range(clients):
        send(next(stream))
    while events:
        now, _, ended = heapq.heappop(events)
        load[ended] -= 1
        if not reports or now - reports[-1][0] > 0.5:
            reports.append((now, {name: sorted(keys) for name, keys in held.items()}))
        while len(reports) > 1 and now - reports[0][0] > 1:
            residency.report(reports.pop(0)[1])
        if (key := next(stream, None)) is not None:
            send(key)
    return Outcome(loads, [count * replicas / requests for count in served.values()])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_skewed_traffic_is_shared_and_few_updates_are_loaded_twice(seed: int) -> None:
    """24 Zipf clusters on 3 replicas: loads and shares within 1.5x of the ideal."""
    outcome = simulate(seed, requests=300, clients=18)
    assert max(outcome.shares) <= 1.5
    assert outcome.loads <= 1.5 * 24


def test_affinity_holds_when_the_stream_goes_on() -> None:
    """Without limit to what a replica holds, spreading ends: a cluster is cold once per replica."""
    outcomes = [simulate(seed, requests=3000, clients=60) for seed in range(4)]
    assert max(share for one in outcomes for share in one.shares) <= 1.5
    assert max(one.loads for one in outcomes) <= 1.5 * 24
