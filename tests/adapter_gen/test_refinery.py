"""When clusters are refined, and on what."""

from __future__ import annotations

import numpy as np
import pytest

from adapter_gen.hypernetwork import Generated
from adapter_gen.refine import Refined
from adapter_gen.refinery import ClusterRefinery, Offered, RefineryConfig, last_tokens
from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import SetupError
from cluster_router.wire.types import AdapterKey, Conditioning

CONFIG = RefineryConfig(buffer=24, every=8, prompt_tokens=16, max_clusters=3)
OWN = ("tenant", 1)
CORES = np.zeros((2, 4, 4), np.float16)


class Recorder:
    """Stands for a Refiner: remembers what it was given, and gains as told.

    Fine: the real one is tested beside it, and takes seconds for each of these.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.calls: list[tuple[list[int], float]] = []

    def refine(self, prompts, start):
        self.calls.append(([int(prompt[0]) for prompt in prompts], float(start.cores.mean())))
        moved = Generated(cores=start.cores + 1, shift=start.shift)
        return Refined(moved if self.scale else start, self.scale, 0.1, 1)


def generate(key: AdapterKey, conditioning: Conditioning) -> LoraDelta:
    return LoraDelta(key, cores=CORES, shift=np.zeros(8, np.float16))


def offered(
    cluster: int | None, token: int, direction: int = 0, namespace: str = "tenant"
) -> Offered:
    embedding = np.eye(4, dtype=np.float32)[direction]
    return Offered(
        namespace,
        AdapterKey("base", "hyper", cluster, 1),
        Conditioning(embedding, 5.0),
        embedding,
        np.full(40, token, np.int64),
    )


def refinery(recorder: Recorder) -> ClusterRefinery:
    return ClusterRefinery(recorder, generate, CONFIG)  # type: ignore[arg-type]


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


def test_each_refinement_starts_from_the_one_before() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    for count in range(8):
        kept.offer(offered(1, count))
    found = kept.refine(OWN)
    assert found is not None
    key, update = found
    assert (key.cluster, float(update.cores.mean())) == (1, 1.0)
    kept.refine(OWN)
    assert [start for _, start in recorder.calls] == [0.0, 1.0]


def test_nothing_is_published_where_nothing_was_gained() -> None:
    kept = refinery(Recorder(scale=0.0))
    for count in range(8):
        kept.offer(offered(1, count))
    assert kept.refine(OWN) is None
    assert kept.due() is None, "it is not tried again on the same prompts"


def test_where_the_update_to_start_from_cannot_be_had_it_is_tried_with_the_next_prompts() -> None:
    def fail(key: AdapterKey, conditioning: Conditioning) -> LoraDelta:
        raise SetupError("cannot list the folder")

    recorder = Recorder()
    kept = ClusterRefinery(recorder, fail, CONFIG)  # type: ignore[arg-type]
    for count in range(8):
        kept.offer(offered(1, count))
    with pytest.raises(SetupError):
        kept.refine(OWN)
    assert kept.due() is None
    for count in range(8, 16):
        kept.offer(offered(1, count))
    assert kept.due() == OWN


def test_a_small_cluster_borrows_the_prompts_most_like_it() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    for count in range(20):
        kept.offer(offered(2, 100 + count, direction=0))
        kept.offer(offered(3, 200 + count, direction=1))
    for count in range(8):
        kept.offer(offered(1, count, direction=1))
    kept.refine(OWN)
    tokens = recorder.calls[0][0]
    assert len(tokens) == CONFIG.buffer
    assert tokens[-8:] == list(range(8))
    assert all(token >= 200 for token in tokens[:-8])


def test_a_prompt_that_comes_again_counts_once() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    for count in range(7):
        kept.offer(offered(1, count))
        kept.offer(offered(1, 0))
    assert kept.due() is None, "seven prompts, one of them eight times"
    for cluster in (2, 3):
        for count in (0, 100, 101):
            kept.offer(offered(cluster, count))
    kept.offer(offered(1, 7))
    assert kept.due() == OWN
    kept.refine(OWN)
    assert recorder.calls[0][0] == [100, 101, *range(8)], "nor is any borrowed twice"


def test_prompts_of_one_tenant_teach_no_other() -> None:
    recorder = Recorder()
    kept = refinery(recorder)
    for count in range(20):
        for cluster in (1, 2):
            kept.offer(offered(cluster, 100 + count, namespace="other"))
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
