"""Every engine is asked for the same: prompts, lengths, clusters."""

from __future__ import annotations

from collections import Counter

import pytest
from serving import WARM_UP
from serving_bench.clients import Arrival, drive
from serving_bench.workload import (
    Request,
    Workload,
    cut_prompts,
    make_workload,
    requests_for,
    zipf_clusters,
)

TEXT = list(range(5000))


@pytest.mark.parametrize(("requests", "clusters"), [(64, 1), (64, 4), (64, 16), (64, 64)])
def test_every_cluster_has_a_request_and_low_ranks_have_more(requests: int, clusters: int) -> None:
    counts = Counter(zipf_clusters(requests, clusters, seed=0))
    assert sorted(counts) == list(range(clusters)) and counts.total() == requests
    by_rank = [counts[cluster] for cluster in range(clusters)]
    assert by_rank == sorted(by_rank, reverse=True)


def test_shares_follow_zipf() -> None:
    counts = Counter(zipf_clusters(10_000, 16, seed=0))
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.01)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.03)


def test_seed_changes_the_order_alone() -> None:
    one, other = zipf_clusters(64, 16, 0), zipf_clusters(64, 16, 1)
    assert one != other and sorted(one) == sorted(other)


def test_more_clusters_than_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="64 requests cannot have 65 clusters"):
        zipf_clusters(64, 65, 0)
    assert requests_for(1000, 64) == 1250 and requests_for(64, 64) == 64


def test_prompts_are_windows_of_the_text() -> None:
    prompts = cut_prompts(TEXT, 500, 64, lengths=0, places="0")
    lengths = [len(prompt) for prompt in prompts]
    assert (min(lengths), max(lengths)) == (48, 80)
    assert sum(lengths) / 500 == pytest.approx(64, abs=1)
    assert all(prompt == list(range(prompt[0], prompt[-1] + 1)) for prompt in prompts)
    with pytest.raises(ValueError, match="too short"):
        cut_prompts(TEXT[:600], 1, 64, lengths=0, places="0")


def test_engines_get_the_same_and_one_process_meets_no_prompt_twice() -> None:
    text = list(range(1_000_000))
    assert make_workload(text, 16, 8, repeat=1) == make_workload(text, 16, 8, repeat=1)
    cells = [
        make_workload(text, clusters, concurrency, repeat)
        for clusters in (None, 1, 16)
        for concurrency in (8, 16)
        for repeat in (WARM_UP, 0, 1, 2)
    ]
    starts = [request.prompt[0] for cell in cells for request in cell.requests]
    assert len(starts) - len(set(starts)) <= 5, "of 1536 places drawn from a million"
    assert {request.cluster for request in cells[0].requests} == {None}


def test_what_is_compared_has_prompts_of_the_same_lengths() -> None:
    def lengths(clusters: int | None, repeat: int) -> list[int]:
        return [len(r.prompt) for r in make_workload(TEXT, clusters, 8, repeat).requests]

    assert lengths(None, 1) == lengths(16, 1) != lengths(16, 2)
    assert lengths(80, 1)[:64] == lengths(1, 1)


def test_a_workload_survives_its_way_to_the_engine() -> None:
    load = make_workload(TEXT, 4, 8, repeat=0, requests=8)
    assert Workload.parse(load.dump()) == load and "\n" not in load.dump()


class CountingEngine:
    """One token for each request in a step of one second; remembers how many ran together."""

    def __init__(self) -> None:
        self.now, self.most = 0.0, 0
        self.left: dict[int, int] = {}

    def add(self, index: int, request: Request, output_tokens: int) -> None:
        self.left[index] = output_tokens
        self.most = max(self.most, len(self.left))

    def step(self):
        self.now += 1
        for index in list(self.left):
            self.left[index] -= 1
            finished = not self.left[index]
            if finished:
                del self.left[index]
            yield Arrival(index, (index,), finished)


def test_clients_keep_exactly_their_number_under_way() -> None:
    engine = CountingEngine()
    load = Workload([Request([1], None)] * 5, output_tokens=3, concurrency=2)
    traces = drive(engine, load, clock=lambda: engine.now)
    assert engine.most == 2
    assert [trace.sent for trace in traces] == [0, 0, 3, 3, 6]
    assert [trace.times for trace in traces] == [
        [1, 2, 3], [1, 2, 3], [4, 5, 6], [4, 5, 6], [7, 8, 9],
    ]  # fmt: skip
    assert [trace.tokens for trace in traces] == [(i, i, i) for i in range(5)]
    assert all(trace.count == 3 for trace in traces)
