"""When clusters are refined, and on what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapter_gen.hypernetwork import Generated
from adapter_gen.refine import Refined
from adapter_gen.refinery import (
    ClusterRefinery,
    CommonConfig,
    Offered,
    RefineryConfig,
    last_tokens,
)
from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import DeltaError, SetupError
from cluster_router.wire.types import COMMON, AdapterKey, Conditioning, Place

CONFIG = RefineryConfig(
    buffer=24,
    every=8,
    prompt_tokens=16,
    max_clusters=3,
    common=CommonConfig(every=1000, buffer=1000),
)
TENANT = CONFIG.model_copy(update={"common": CommonConfig(every=12, buffer=16)})
STATIC = Generated(cores=torch.zeros(1, 2, 4, 4), shift=torch.zeros(1, 8))
OWN, ALL = ("tenant", 1), ("tenant", COMMON)
CORES = np.zeros((2, 4, 4), np.float16)


class Recorder:
    """Stands for a Refiner: remembers what it was given, and gains as told.

    Fine: the real one is tested beside it, and takes seconds for each of these.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.calls: list[tuple[list[int], float]] = []

    def refine(self, prompts, start):
        start = start or STATIC
        self.calls.append(([int(prompt[0]) for prompt in prompts], float(start.cores.mean())))
        moved = Generated(cores=start.cores + 1, shift=start.shift)
        return Refined(moved if self.scale else start, self.scale, 0.1, 1)


def generate(key: AdapterKey, conditioning: Conditioning) -> LoraDelta:
    return LoraDelta(key, cores=CORES, shift=np.zeros(8, np.float16))


def offered(
    cluster: int | None, token: int, namespace: str = "tenant", refinement: str = ""
) -> Offered:
    embedding = np.eye(4, dtype=np.float32)[0]
    return Offered(
        namespace,
        AdapterKey("base", "hyper", cluster, 1, refinement),
        Conditioning(embedding, 5.0),
        np.full(40, token, np.int64),
    )


def recall(key: AdapterKey, place: Place) -> LoraDelta | None:
    return None


def refinery(recorder: Recorder) -> ClusterRefinery:
    return ClusterRefinery(recorder, Recorder(), generate, recall, CONFIG)  # type: ignore[arg-type]


class Tenant:
    """A refinery that refines what is common as well."""

    def __init__(self, scale: float = 1.0, recall=recall) -> None:
        self.clusters, self.common = Recorder(), Recorder(scale)
        self.refinery = ClusterRefinery(self.clusters, self.common, generate, recall, TENANT)  # type: ignore[arg-type]
        self.token = 0

    def offer(self, cluster: int, count: int, namespace: str = "tenant") -> None:
        for _ in range(count):
            self.token += 1
            self.refinery.offer(offered(cluster, self.token, namespace=namespace))

    def work(self) -> list[tuple[Place, dict[Place, float]]]:
        """All that is due, and the mean cores that came of it."""
        done = []
        while (place := self.refinery.due()) is not None:
            found = self.refinery.refine(place)
            done.append((place, {one: float(g.cores.mean()) for one, (_, g) in found.items()}))
        return done


def test_a_cluster_is_due_when_its_prompts_have_doubled() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    due = []
    for count in range(1, 81):
        kept.offer(offered(1, count))
        if kept.due() == OWN:
            due.append(count)
            kept.refine(OWN)
    assert due == [8, 16, 32, 56, 80]
    assert recorder.calls[-1][0] == list(range(57, 81)), "the latest, as many as the buffer holds"


def test_each_refinement_starts_from_what_is_generated() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    for count in range(8):
        kept.offer(offered(1, count))
    [(key, update)] = kept.refine(OWN).values()
    assert (key.cluster, float(update.cores.mean())) == (1, 1.0)
    for count in range(8, 16):
        kept.offer(offered(1, count))
    kept.refine(OWN)
    assert [start for _, start in recorder.calls] == [0.0, 0.0]


def test_what_is_common_comes_first_and_clusters_start_from_it() -> None:
    tenant = Tenant()
    tenant.offer(2, 3)
    tenant.offer(1, 9)
    two = ("tenant", 2)
    assert tenant.work() == [(ALL, {ALL: 1.0}), (OWN, {OWN: 2.0}), (two, {two: 1.0})]
    [(learned, start)] = tenant.common.calls
    assert (learned, start) == (list(range(1, 13)), 0.0)
    assert tenant.clusters.calls == [(list(range(4, 13)), 1.0)]


def test_clusters_get_what_is_common_before_it_is_learned_anew() -> None:
    tenant = Tenant()
    tenant.offer(1, 12)
    tenant.refinery.refine(ALL)
    tenant.offer(1, 20)
    assert [place for place, _ in tenant.work()] == [OWN, ALL, OWN]


def test_a_prompt_of_two_clusters_teaches_what_is_common_once() -> None:
    tenant = Tenant()
    for cluster in (1, 2):
        for token in range(7):
            tenant.refinery.offer(offered(cluster, token))
    assert tenant.refinery.due() is None, "7 of 12"


def test_what_is_common_goes_on_from_where_it_was_with_the_latest_prompts() -> None:
    tenant = Tenant()
    tenant.offer(1, 12)
    tenant.work()
    tenant.offer(1, 11)
    assert tenant.refinery.due() != ALL
    tenant.offer(1, 1)
    tenant.work()
    assert tenant.common.calls[1] == (list(range(9, 25)), 1.0), "as many as the buffer holds"


def test_clusters_follow_what_is_common_once_it_has_moved() -> None:
    tenant = Tenant()
    tenant.offer(1, 12)
    tenant.work()
    tenant.offer(2, 7)
    tenant.offer(1, 5)
    two = ("tenant", 2)
    assert dict(tenant.work()) == {ALL: {ALL: 2.0}, OWN: {OWN: 3.0}, two: {two: 2.0}}
    assert tenant.clusters.calls[-1] == ([*range(1, 13), *range(20, 25)], 2.0), (
        "it alone has enough"
    )


def test_a_tenant_that_has_nothing_in_common_changes_nothing() -> None:
    tenant = Tenant(scale=0.0)
    tenant.offer(1, 12)
    assert tenant.work() == [(ALL, {}), (OWN, {OWN: 1.0})]


def test_tenants_have_nothing_in_common() -> None:
    tenant = Tenant()
    tenant.offer(1, 11)
    tenant.offer(1, 12, "other")
    done = [place for place, _ in tenant.work()]
    assert done.count(("other", COMMON)) == 1
    assert ALL not in done
    assert tenant.common.calls[0][0] == list(range(12, 24))


def test_what_was_common_before_a_restart_is_where_it_goes_on() -> None:
    asked = []

    def kept(key: AdapterKey, place: Place) -> LoraDelta | None:
        asked.append(place)
        return LoraDelta(key, cores=CORES + 5, shift=np.zeros(8, np.float16))

    tenant = Tenant(recall=kept)
    tenant.offer(1, 1)
    assert tenant.work() == [(OWN, {OWN: 5.0})]
    tenant.refinery.offer(offered(2, 99, refinement="cafe"))
    assert tenant.work() == [], "it is served with what it was refined to before"
    tenant.offer(1, 10)
    two = ("tenant", 2)
    assert dict(tenant.work()) == {ALL: {ALL: 6.0}, OWN: {OWN: 7.0}, two: {two: 6.0}}
    assert asked == [ALL]


def test_what_fails_is_not_tried_again_at_once() -> None:
    tenant = Tenant()
    tenant.offer(1, 12)
    tenant.refinery.refine(ALL)

    def fail(prompts, start):
        raise DeltaError("a loss of nan")

    tenant.clusters.refine = fail  # type: ignore[method-assign]
    assert tenant.refinery.due() == OWN
    with pytest.raises(DeltaError):
        tenant.refinery.refine(OWN)
    assert tenant.refinery.due() is None


def test_a_tenant_without_clusters_is_forgotten() -> None:
    tenant = Tenant()
    tenant.offer(1, 11)
    for cluster in (1, 2, 3):
        tenant.offer(cluster, 1, "other")
    assert ALL not in tenant.refinery.held()
    assert ("other", COMMON) in tenant.refinery.held()


def test_nothing_is_published_where_nothing_was_gained() -> None:
    kept = refinery(Recorder(scale=0.0))
    for count in range(8):
        kept.offer(offered(1, count))
    assert kept.refine(OWN) == {}
    assert kept.due() is None, "it is not tried again on the same prompts"


def test_where_the_update_to_start_from_cannot_be_had_it_is_tried_with_the_next_prompts() -> None:
    def fail(key: AdapterKey, conditioning: Conditioning) -> LoraDelta:
        raise SetupError("cannot list the folder")

    recorder = Recorder()
    kept = ClusterRefinery(recorder, recorder, fail, recall, CONFIG)  # type: ignore[arg-type]
    for count in range(8):
        kept.offer(offered(1, count))
    with pytest.raises(SetupError):
        kept.refine(OWN)
    assert kept.due() is None
    for count in range(8, 16):
        kept.offer(offered(1, count))
    assert kept.due() == OWN


def test_a_prompt_that_comes_again_counts_once() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    for count in range(7):
        kept.offer(offered(1, count))
        kept.offer(offered(1, 0))
    assert kept.due() is None, "seven prompts, one of them eight times"
    kept.offer(offered(1, 7))
    assert kept.due() == OWN
    kept.refine(OWN)
    assert recorder.calls[0][0] == list(range(8))


def test_prompts_of_one_tenant_teach_no_other() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    for count in range(20):
        kept.offer(offered(1, 100 + count, namespace="other"))
    for count in range(8):
        kept.offer(offered(1, count))
    kept.refine(OWN)
    assert recorder.calls[0][0] == list(range(8))


def test_the_end_of_a_long_prompt_is_kept() -> None:
    lengths = []

    class Measuring(Recorder):
        def refine(self, prompts, start):
            lengths.extend((len(prompt), int(prompt[-1])) for prompt in prompts)
            return super().refine(prompts, start)

    kept = refinery(Measuring())
    for count in range(8):
        one = offered(1, count)
        one.tokens[-1] = 9
        kept.offer(one)
    kept.refine(OWN)
    assert lengths == [(CONFIG.prompt_tokens, 9)] * 8


def test_what_the_tokenizer_puts_in_front_stays_there() -> None:
    prompt = tuple(range(100))
    assert last_tokens(prompt, 20).tolist() == [*range(80, 100)]
    assert last_tokens(prompt, 20, (0, 1)).tolist() == [0, 1, *range(82, 100)]
    assert last_tokens(prompt, 20, (7,)).tolist() == [*range(80, 100)], "it had none"
    assert last_tokens(prompt[:20], 20, (0, 1)).tolist() == [*range(20)]


def test_prompts_are_bounded_and_those_without_a_cluster_let_go() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    for cluster in (None, 1, 2, 3, 4):
        for count in range(30):
            kept.offer(offered(cluster, count))
    due = set()
    while (place := kept.due()) is not None:
        due.add(place)
        kept.refine(place)
    assert due == {("tenant", 2), ("tenant", 3), ("tenant", 4)}
    assert all(len(tokens) <= CONFIG.buffer for tokens, _ in recorder.calls)
