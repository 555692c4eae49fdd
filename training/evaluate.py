"""Held-out figures of a bundle: unadapted, static, generated, and generated for a wrong cluster.

Every document is handled as serving would: its own context alone chooses the cluster, the bundle's
snapshot conditions the update, and only tokens after the context are scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import CoreHypernetwork
from adapter_gen.update import SharedBases
from cluster_router.embedding import TokenEmbedder
from cluster_router.wire.errors import BundleError
from training.base import FrozenBase
from training.clusters import NO_CLUSTER, Conditions, IntArray, assign, embed_contexts, shuffled
from training.data import Window
from training.features import Features
from training.modules import AdaptedHead, Batch, HeadBases
from training.statistics import Array, Bootstrap

VARIANTS = ("base", "static", "hyper", "shuffled")
GAINS = {
    "over_base": ("base", "hyper"),
    "net": ("static", "hyper"),
    "conditioning": ("shuffled", "hyper"),
}
"""Gain: (worse, better). Positive when the second variant has the lower loss."""

_ROWS = 2048
"""Scored tokens in one call."""
RESAMPLES = 10_000


@dataclass(frozen=True, eq=False)
class Losses:
    """Summed loss of each document under each variant, in nats.

    `rows` is the cluster each document was assigned to.
    """

    windows: Sequence[Window]
    rows: IntArray
    sums: dict[str, Array]


class Evaluator:
    """Measures one bundle.

    Args:
        base: the base model.
        bundle: what is measured.
        static: the baseline, a static update trained alone on the same tokens.
        seed: of the shuffled control and of the bootstrap.

    Raises:
        BundleError: the bundle is of another depth than `head`.
    """

    def __init__(
        self, base: FrozenBase, bundle: Bundle, static: SharedBases, seed: int = 0
    ) -> None:
        self._bundle = bundle
        self._seed = seed
        self._weight = base.head
        self._embedder = TokenEmbedder(base.embedding, bundle.token_weights)
        if not isinstance(bundle.hypernetwork, CoreHypernetwork):
            raise BundleError("only bundles of depth head can be evaluated", "bundle")
        self._generated = AdaptedHead(HeadBases(bundle.bases), bundle.hypernetwork, base.head)
        self._static = AdaptedHead(HeadBases(static), None, base.head)
        unchanged = SharedBases(
            static.u, static.v, torch.zeros_like(static.s0), torch.zeros_like(static.shift)
        )
        self._base = AdaptedHead(HeadBases(unchanged), None, base.head)

    def losses(self, features: Features, label: str) -> Losses:
        """Loss of every document under every variant."""
        snapshot = self._bundle.snapshot
        rows = assign(embed_contexts(features.windows, self._embedder), snapshot)
        wrong = shuffled(rows, snapshot, self._seed)
        correct, other = Conditions.of(rows, snapshot), Conditions.of(wrong, snapshot)
        plans = {
            "base": (self._base, None),
            "static": (self._static, None),
            "hyper": (self._generated, correct),
            "shuffled": (self._generated, other),
        }
        sums = {name: np.zeros(len(features)) for name in VARIANTS}
        with tqdm(total=features.tokens * len(plans), desc=label, unit="tok") as progress:
            for name, (module, conditions) in plans.items():
                for indices in _groups(features):
                    sums[name][indices] = _sums(module, features, indices, conditions)
                    progress.update(sum(features.windows[i].scored for i in indices))
        return Losses(features.windows, rows, sums)

    def report(self, losses: Losses) -> dict[str, Any]:
        """Figures by domain and their mean, JSON values only."""
        domains = [window.domain for window in losses.windows]
        tokens = [window.scored for window in losses.windows]
        bootstrap = Bootstrap(domains, tokens, RESAMPLES, self._seed)
        by_domain = {name: _domain(losses, name, bootstrap) for name in dict.fromkeys(domains)}
        return {"domains": by_domain, "mean": _mean(losses, by_domain, bootstrap)}


def _groups(features: Features) -> Iterator[list[int]]:
    """Runs of windows with about `_ROWS` scored tokens."""
    group: list[int] = []
    rows = 0
    for index, window in enumerate(features.windows):
        group.append(index)
        rows += window.scored
        if rows >= _ROWS:
            yield group
            group, rows = [], 0
    if group:
        yield group


@torch.inference_mode()
def _sums(
    module: AdaptedHead, features: Features, indices: list[int], conditions: Conditions | None
) -> Array:
    counts = torch.tensor([features.windows[i].scored for i in indices])
    batch = Batch(
        hidden=torch.cat([features.hidden(i) for i in indices]),
        targets=torch.cat([features.targets(i) for i in indices]),
        owner=torch.repeat_interleave(torch.arange(len(indices)), counts),
        conditions=None if conditions is None else conditions.take(indices),
    )
    losses, _ = module(batch)
    parts = losses.double().split(counts.tolist())
    return np.array([float(part.sum()) for part in parts])


def _domain(losses: Losses, name: str, bootstrap: Bootstrap) -> dict[str, Any]:
    chosen = [i for i, window in enumerate(losses.windows) if window.domain == name]
    tokens = sum(losses.windows[i].scored for i in chosen)
    text = sum(losses.windows[i].scored_bytes for i in chosen)
    totals = {variant: float(losses.sums[variant][chosen].sum()) for variant in VARIANTS}
    return {
        "documents": len(chosen),
        "tokens": tokens,
        "unassigned": round(float((losses.rows[chosen] == NO_CLUSTER).mean()), 4),
        "nats_per_token": {v: round(total / tokens, 5) for v, total in totals.items()},
        "bits_per_byte": {v: round(total / math.log(2) / text, 5) for v, total in totals.items()},
        "gains": {
            gain: bootstrap.domain(name, losses.sums[worse] - losses.sums[better]).as_json()
            for gain, (worse, better) in GAINS.items()
        },
    }


def _mean(
    losses: Losses, domains: dict[str, dict[str, Any]], bootstrap: Bootstrap
) -> dict[str, Any]:
    def average(unit: str) -> dict[str, float]:
        return {
            v: round(float(np.mean([figures[unit][v] for figures in domains.values()])), 5)
            for v in VARIANTS
        }

    return {
        "documents": len(losses.windows),
        "tokens": sum(window.scored for window in losses.windows),
        "nats_per_token": average("nats_per_token"),
        "bits_per_byte": average("bits_per_byte"),
        "gains": {
            gain: bootstrap.mean(losses.sums[worse] - losses.sums[better]).as_json()
            for gain, (worse, better) in GAINS.items()
        },
    }
