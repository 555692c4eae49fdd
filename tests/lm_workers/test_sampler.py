from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cluster_router.wire.types import SamplingParams
from lm_workers.layers.reference import ReferenceKernels
from lm_workers.sampler import Sampler, _by_order, _by_value, score
from lm_workers.sequence import Sequence

EOS = 3
LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1]))


def sequence(
    seed: int = 0, outputs: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,), **params: object
) -> Sequence:
    sampling = SamplingParams.model_validate({"max_tokens": 99, **params})
    one = Sequence("r", prompt, sampling, None, detokenizer=None, seed=seed, arrival=0.0)  # type: ignore[arg-type]
    one.tokens += outputs
    return one


def choose(*sequences: Sequence, logits: torch.Tensor = LOGITS) -> list[int]:
    rows = logits.expand(len(sequences), -1)
    return [
        one.token
        for one in Sampler(frozenset({EOS}), ReferenceKernels()).sample(rows, list(sequences))
    ]


def frequencies(count: int = 4000, **params: object) -> dict[int, float]:
    drawn = Counter(choose(*(sequence(seed=seed, **params) for seed in range(count))))
    return {token: times / count for token, times in drawn.items()}


def test_temperature_zero_is_greedy() -> None:
    assert choose(*(sequence(seed=seed, temperature=0) for seed in range(8))) == [1] * 8


def test_frequencies_follow_the_distribution() -> None:
    found = frequencies()
    for token, expected in enumerate(LOGITS.exp().tolist()):
        assert found[token] == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000))


def test_temperature_sharpens() -> None:
    found = frequencies(temperature=0.5)
    squared = LOGITS.exp() ** 2
    assert found[1] == pytest.approx(float(squared[1] / squared.sum()), abs=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.69}, {1, 2}),
        ({"top_p": 0.71}, {1, 2, 3}),
        ({"top_p": 1e-6}, {1}),
        ({"min_p": 0.3}, {1, 2, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.8}, {1, 2}),
    ],
)
def test_truncation_keeps_exactly(params: dict[str, float], kept: set[int]) -> None:
    found = frequencies(count=1500, **params)
    assert set(found) == kept
    mass = sum(float(LOGITS[token].exp()) for token in kept)
    for token in kept:
        assert found[token] == pytest.approx(float(LOGITS[token].exp()) / mass, abs=0.06)


FILTERS = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 1e-6},
    {"top_p": 0.5},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 333, "top_p": 0.5, "min_p": 0.01},
]


@pytest.mark.parametrize("steps", [0, 1, 4, 2**20], ids=["all equal", "many", "some", "few"])
@pytest.mark.parametrize("spread", [0.1, 2.0, 12.0])
def test_sorted_values_leave_the_bits_that_sorted_tokens_do(steps: int, spread: float) -> None:
    logits = spread * torch.randn(len(FILTERS), 1000, generator=torch.Generator().manual_seed(1))
    logits = (logits * steps).round() / max(1, steps)
    logits[:, 500:600] = -torch.inf
    probabilities = logits.softmax(-1)
    params = [SamplingParams.model_validate({"max_tokens": 9, **one}) for one in FILTERS]
    found = _by_value(probabilities, params)
    assert torch.equal(found, _by_order(probabilities, params))
    assert (found[0] > 0).sum() == 1 and 38 < (found[1] > 0).sum() <= 40  # the last may round away
    assert 0 < (found[-1] > 0).sum() <= 333


def test_of_equal_tokens_the_first_stay() -> None:
    equal = torch.zeros(8)
    found = [choose(sequence(seed=seed, top_k=3), logits=equal)[0] for seed in range(60)]
    assert set(found) == {0, 1, 2}
    equal[6] = 1.0
    found = [choose(sequence(seed=seed, top_k=3), logits=equal)[0] for seed in range(60)]
    assert set(found) == {0, 1, 6}


class Sorts(TorchFunctionMode):
    """Counts how often torch sorts."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in {"sort", "argsort"}
        return func(*args, **(kwargs or {}))


def test_a_cpu_does_not_sort_tokens() -> None:
    with Sorts() as sorts:
        choose(sequence(top_p=0.5), sequence(top_k=2), sequence(min_p=0.1))
    assert not sorts.count


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    loud = {"temperature": 2.0, "top_k": 1, "logit_bias": {4: 100.0}}
    alone = [choose(sequence(seed=seed))[0] for seed in range(50)]
    among = [choose(sequence(0, **loud), sequence(seed), sequence(9))[1] for seed in range(50)]
    assert alone == among


def test_each_position_of_a_seed_draws_anew() -> None:
    drawn = [choose(sequence(seed=5, outputs=(0,) * n))[0] for n in range(200)]
    assert drawn == [choose(sequence(seed=5, outputs=(0,) * n))[0] for n in range(200)]
    assert len(set(drawn)) == 5


def test_huge_and_tiny_temperatures_stay_finite() -> None:
    wild = torch.tensor([1e4, 1e4 - 1, -1e4, 0.0, 5.0])
    assert choose(sequence(temperature=1e-6), logits=wild) == [0]
    assert choose(sequence(temperature=2.0), logits=wild)[0] in {0, 1}


def test_presence_and_frequency_penalties_count_outputs_only() -> None:
    assert choose(sequence(temperature=0, prompt=(1, 1), presence_penalty=2.0)) == [1]
    assert choose(sequence(temperature=0, outputs=(1,), presence_penalty=2.0)) == [2]
    # ln(0.4) - 0.2 n < ln(0.3) first at n = 2
    assert choose(sequence(temperature=0, outputs=(1,), frequency_penalty=0.2)) == [1]
    assert choose(sequence(temperature=0, outputs=(1, 1), frequency_penalty=0.2)) == [2]


def test_repetition_penalty_counts_the_prompt_too() -> None:
    assert choose(sequence(temperature=0, prompt=(1,), repetition_penalty=2.0)) == [2]


def test_logit_bias() -> None:
    assert choose(sequence(temperature=0, logit_bias={4: 10.0})) == [4]
    assert choose(sequence(temperature=0, logit_bias={1: -100.0})) == [2]


def test_min_tokens_forbids_ending() -> None:
    ending = torch.tensor([0.0, 1.0, 2.0, 9.0, 8.0])
    params = {"temperature": 0, "min_tokens": 1, "stop_token_ids": (4,)}
    assert choose(sequence(**params), logits=ending) == [2]
    assert choose(sequence(outputs=(0,), **params), logits=ending) == [EOS]


def test_logprobs_are_the_models_own() -> None:
    wanted = sequence(temperature=0, logprobs=2, logit_bias={4: 10.0})
    [sampled] = Sampler(frozenset(), ReferenceKernels()).sample(LOGITS[None], [wanted])
    assert sampled.token == 4
    assert sampled.logprob == pytest.approx(math.log(0.1), abs=1e-5)
    assert [token for token, _ in sampled.top] == [1, 2]
    assert sampled.top[0][1] == pytest.approx(math.log(0.4), abs=1e-5)


def test_score_ranks_each_row_as_asked() -> None:
    rows = score(LOGITS.expand(3, -1), torch.tensor([0, 1, 2]), [0, 1, 5])
    assert [len(row.top) for row in rows] == [0, 1, 5]
    assert sum(math.exp(value) for _, value in rows[2].top) == pytest.approx(1, abs=1e-5)
