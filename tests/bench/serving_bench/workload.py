"""What every engine is asked to do: the same prompts, lengths and clusters, as plain JSON.

Standard library only: engines import it in environments of their own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, and the cluster whose update it runs under (None: unadapted)."""

    prompt: list[int]
    cluster: int | None


@dataclass(frozen=True)
class Workload:
    """Requests of `output_tokens` greedy tokens each, sent by `concurrency` clients.

    Every client sends its next request when its last one has ended, so that `concurrency` requests
    are under way until none are left.
    """

    requests: list[Request]
    output_tokens: int
    concurrency: int

    def dump(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, line: str) -> Workload:
        """Inverse of `dump`."""
        fields: dict[str, Any] = json.loads(line)
        return cls(**{**fields, "requests": [Request(**one) for one in fields["requests"]]})


@dataclass
class Trace:
    """One request: seconds since the workload's start, and the tokens that came back.

    `times` has an entry for each arrival of output, `count` is the number of output tokens.
    `tokens` is empty where the engine's interface does not tell them.
    """

    sent: float
    times: list[float]
    count: int = 0
    tokens: tuple[int, ...] = ()


def requests_for(clusters: int, least: int) -> int:
    """How many requests spread over `clusters`: `least`, or a quarter more than clusters."""
    return least if clusters <= least else clusters + clusters // 4


def zipf_clusters(requests: int, clusters: int, seed: int) -> list[int]:
    """A cluster for each request, in random order.

    Every cluster has one request; what is left is shared out in proportion to 1 / rank.

    Raises:
        ValueError: there are fewer requests than clusters.
    """
    if requests < clusters:
        raise ValueError(f"{requests} requests cannot have {clusters} clusters")
    left = requests - clusters
    total = sum(1 / rank for rank in range(1, clusters + 1))
    shares = [left / (rank * total) for rank in range(1, clusters + 1)]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(clusters), key=lambda k: counts[k] - shares[k])
    for cluster in by_remainder[: left - sum(counts)]:
        counts[cluster] += 1
    found = [cluster for cluster, count in enumerate(counts) for _ in range(count + 1)]
    random.Random(seed).shuffle(found)
    return found


def cut_prompts(
    text: Sequence[int], count: int, mean: int, lengths: int, places: str
) -> list[list[int]]:
    """`count` windows of a tokenised text, a quarter shorter to a quarter longer than `mean`.

    Args:
        text: what is cut.
        count: of prompts.
        mean: of their lengths.
        lengths: seed of their lengths.
        places: seed of where they are cut. As text, since Python's generator takes -1 for 1.

    Raises:
        ValueError: the text is shorter than ten prompts.
    """
    spread = mean // 4
    last = len(text) - mean - spread
    if last < 10 * mean:
        raise ValueError(f"a text of {len(text)} tokens is too short to cut prompts from")
    place, length = random.Random(places), random.Random(lengths)
    starts = [place.randrange(last) for _ in range(count)]
    return [list(text[start : start + mean + length.randint(-spread, spread)]) for start in starts]


def make_workload(
    text: Sequence[int],
    clusters: int | None,
    concurrency: int,
    repeat: int,
    *,
    requests: int = 64,
    prompt_tokens: int = 64,
    output_tokens: int = 64,
) -> Workload:
    """The workload of one run, the same for every engine.

    Other `clusters`, another `concurrency` or `repeat` has other prompts, so that an engine's
    process meets none twice and no cache helps. Lengths follow from `repeat` alone: whatever is
    compared within one has prompts as long.

    Args:
        text: where prompts are cut from.
        clusters: distinct clusters; None runs unadapted.
        concurrency: clients.
        repeat: number of the run.
        requests: least number of requests.
        prompt_tokens: mean length of prompts.
        output_tokens: tokens of every answer.
    """
    count = requests if clusters is None else requests_for(clusters, requests)
    assigned = [None] * count if clusters is None else zipf_clusters(count, clusters, repeat)
    cell = f"{clusters} {concurrency} {repeat}"
    prompts = cut_prompts(text, count, prompt_tokens, repeat, cell)
    return Workload(
        [Request(*pair) for pair in zip(prompts, assigned, strict=True)],
        output_tokens,
        concurrency,
    )
