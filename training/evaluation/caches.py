"""Cache language models on top of the static update, the classic way to adapt to recent text.

The unigram cache predicts a token by how often it came before: in the cluster's earlier contexts
and in the document so far. The neural cache (Grave et al., arXiv 1612.04426) weighs each earlier
occurrence by the similarity of the hidden states before it. Either is mixed with the model's own
prediction; the weight, and the sharpness of the neural one, are chosen on warm-up documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from adapter_gen.apply import adapted, apply_head
from adapter_gen.hypernetwork import Generated
from adapter_gen.update import SharedBases
from training.data import Window
from training.evaluation.scores import Scores
from training.evaluation.updates import Family, window_key, zeros
from training.statistics import Array

Kind = Literal["unigram", "neural"]
KINDS: tuple[Kind, ...] = ("unigram", "neural")
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
SHARPNESS = (5.0, 10.0, 20.0, 40.0)
"""Of the softmax over cosines of hidden states."""
_UNTUNED = {"unigram": 3, "neural": 2 * len(WEIGHTS) + 3}
"""Place in the grid where there is nothing to tune on: weight 0.05, sharpness 20."""
_HELD = 64

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CacheCase:
    """A document and the earlier contexts of its cluster."""

    window: Window
    support: Sequence[Window]

    @property
    def tokens(self) -> int:
        """Tokens through the model."""
        return len(self.window.tokens)


@dataclass(frozen=True, eq=False)
class _Read:
    """A text under the static update.

    Attributes:
        tokens: int64 [T].
        states: float32 [T - 1, d], unit length; row i stands before token i + 1.
        logprobs: float64 [T - 1], of token i + 1.
    """

    tokens: Ints
    states: torch.Tensor
    logprobs: Array


class CacheScorer:
    """Losses with a cache, for every setting of a grid.

    Args:
        scores: base model, store and progress.
        static: the update that the cache goes on top of.
    """

    def __init__(self, scores: Scores, static: Family) -> None:
        self._scores = scores
        self._static = static
        self._held: dict[str, _Read] = {}

    def grid(self, kind: Kind, case: CacheCase) -> Array:
        """Summed loss [settings] over the scored tokens.

        The settings are `WEIGHTS`, for the neural cache under each of `SHARPNESS`.
        """
        key = self._scores.key(
            f"{kind} cache", WEIGHTS, SHARPNESS, self._static.key, window_key(case.window),
            [window_key(earlier) for earlier in case.support],
        )  # fmt: skip
        kept = self._scores.store.score(key)
        if kept is not None:
            self._scores.work.spared(case.tokens)
            return np.array(kept)
        own = self._read(case.window.tokens)
        model = own.logprobs[case.window.context - 1 :]
        if kind == "unigram":
            sums = _mix(model, unigram_probabilities(case))
        else:
            support = [self._remember(earlier) for earlier in case.support]
            parts = neural_probabilities(own, support, case.window.context)
            sums = np.concatenate([_mix(model, part) for part in parts])
        self._scores.store.add({key: sums.tolist()})
        self._scores.work.done(case.tokens)
        return sums

    def _remember(self, earlier: Window) -> _Read:
        key = window_key(earlier)
        if key not in self._held:
            while len(self._held) >= _HELD:
                self._held.pop(next(iter(self._held)))
            self._held[key] = self._read(earlier.context_tokens)
        return self._held[key]

    @torch.inference_mode()
    def _read(self, tokens: NDArray[np.int32]) -> _Read:
        model: Any = self._scores.base.model
        head: torch.Tensor = self._scores.base.head
        bases = self._static.load()
        assert bases is not None
        bases = _as(bases, head)
        generated = zeros(self._static.spec)
        assert generated.cores is not None
        nothing = Generated(cores=generated.cores.to(head), shift=None)
        ids = torch.from_numpy(tokens.astype(np.int64)).to(head.device)
        with adapted(model, self._static.spec, bases, nothing):
            decoded = model.get_decoder()(input_ids=ids[None], use_cache=False)
        states = apply_head(decoded.last_hidden_state[0, :-1], bases)  # [T - 1, d]
        logits = (states @ head.T).float()
        chosen = logits.gather(1, ids[1:, None])[:, 0] - logits.logsumexp(1)
        unit = torch.nn.functional.normalize(states.float(), dim=1).cpu()
        return _Read(ids.cpu().numpy(), unit, chosen.double().cpu().numpy())


def unigram_probabilities(case: CacheCase) -> Array:
    """Of each scored token [n]: its share of all tokens that came before it."""
    counts: dict[int, int] = {}
    total = 0
    before = [earlier.content_tokens for earlier in case.support]
    for part in (*before, case.window.content_tokens):
        for token in part.tolist():
            counts[token] = counts.get(token, 0) + 1
        total += len(part)
    found = []
    for token in case.window.targets.tolist():
        found.append(counts.get(token, 0) / total)
        counts[token] = counts.get(token, 0) + 1
        total += 1
    return np.array(found)


def neural_probabilities(own: _Read, support: Sequence[_Read], context: int) -> list[Array]:
    """For each sharpness: of each scored token [n], the weight of its earlier occurrences."""
    states = torch.cat([*(read.states for read in support), own.states])
    followed = np.concatenate([*(read.tokens[1:] for read in support), own.tokens[1:]])
    offset = len(states) - len(own.states)
    queries = own.states[context - 1 :]  # [n, d]
    cosines = (queries @ states.T).double()  # [n, m]
    # A state may be looked back on once the token after it is known.
    limits = offset + context - 1 + torch.arange(len(queries))
    hidden = torch.arange(len(states))[None] >= limits[:, None]
    targets = own.tokens[context:]
    same = torch.from_numpy(followed[None] == targets[:, None])
    found = []
    for sharpness in SHARPNESS:
        weights = (sharpness * cosines).masked_fill(hidden, -torch.inf).softmax(1)
        # With nothing to look back on yet, every weight is undefined and none is given.
        found.append((weights.nan_to_num(0.0) * same).sum(1).numpy())
    return found


def _mix(model: Array, cache: Array) -> Array:
    mixed = [
        -np.logaddexp(np.log1p(-weight) + model, np.log(np.maximum(weight * cache, 1e-300)))
        for weight in WEIGHTS
    ]
    return np.array([float(losses.sum()) for losses in mixed])


def _as(bases: SharedBases, like: torch.Tensor) -> SharedBases:
    return SharedBases(
        u=tuple(u.to(like) for u in bases.u),
        v=tuple(v.to(like) for v in bases.v),
        s0=bases.s0.to(like),
        shift=bases.shift.to(like),
    )


@dataclass(frozen=True, eq=False)
class Cached:
    """The variant of one kind of cache.

    Attributes:
        name: of the variant.
        kind: of the cache.
        cases: one for each window, None where it is not measured.
        tuning: warm-up documents, on all of whose tokens the setting is chosen.
        static: the update that the cache goes on top of.
    """

    name: str
    kind: Kind
    cases: Sequence[CacheCase | None]
    tuning: Sequence[CacheCase]
    static: Family

    @property
    def tokens(self) -> int:
        """See `Variant.tokens`."""
        return sum(case.tokens for case in (*self.cases, *self.tuning) if case is not None)

    def nats(self, scores: Scores) -> Array:
        """See `Variant.nats`."""
        scores.work.label(self.name)
        scorer = CacheScorer(scores, self.static)
        chosen = _UNTUNED[self.kind]
        if self.tuning:
            totals = sum(scorer.grid(self.kind, case) for case in self.tuning)
            chosen = int(np.argmin(totals))
        return np.array(
            [
                np.nan if case is None else scorer.grid(self.kind, case)[chosen]
                for case in self.cases
            ]
        )
