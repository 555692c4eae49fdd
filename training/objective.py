"""The training loss over a part of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapter_gen.nll import head_nll


@dataclass(frozen=True, eq=False)
class Candidates:
    """A part of the vocabulary that stands for all of it in one training batch.

    Attributes:
        tokens: int64 [k], ascending.
        offset: float32 [k], log of how many tokens of the vocabulary each one stands for.
    """

    tokens: torch.Tensor
    offset: torch.Tensor

    def nll(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """`head_nll` over these tokens; every target is among them."""
        rows = torch.searchsorted(self.tokens, targets)
        return head_nll(hidden, weight[self.tokens], rows, self.offset)


class CandidateSampler:
    """Draws candidates: the batch's targets, the most frequent tokens, and a sample of the rest.

    The sampled ones are weighted so that the expected normaliser is the exact one. The head's two
    matrix products over the whole vocabulary are nearly all the cost of a step, and a sixth of the
    vocabulary takes a sixth of the time. Figures are never computed this way.

    Args:
        counts: int64 [vocabulary], how often each token is a target in the training set.
        always: how many of the most frequent tokens are always taken.
        sampled: how many of the others are drawn.
    """

    def __init__(self, counts: torch.Tensor, always: int, sampled: int) -> None:
        self._frequent = counts.topk(min(always, len(counts))).indices
        self._size = len(counts)
        self._sampled = sampled

    def draw(self, targets: torch.Tensor, seed: int) -> Candidates:
        """Candidates for a batch with these targets, int64 [n]; a function of both."""
        random = torch.Generator().manual_seed(seed)
        rest = torch.ones(self._size, dtype=torch.bool)
        rest[self._frequent] = False
        rest[targets] = False
        others = rest.nonzero().squeeze(1)
        chosen = others[torch.randperm(len(others), generator=random)[: self._sampled]]
        weight = torch.zeros(self._size)
        weight[~rest] = 1.0
        weight[chosen] = len(others) / max(1, len(chosen))
        tokens = weight.nonzero().squeeze(1)
        return Candidates(tokens, weight[tokens].log())
