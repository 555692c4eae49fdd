"""From logits to tokens, for a whole batch, each row under its own parameters.

A row's result depends on its logits, its parameters and its own (seed, position) alone; never on
the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from cluster_router.wire.types import SamplingParams
from lm_workers.layers.kernels import Kernels
from lm_workers.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's outcome: the token, its log-probability, and the most likely tokens.

    Log-probabilities (nats) are the adapted model's own, before penalties and temperature.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses one token a row.

    Args:
        eos: token ids that end an answer.
        kernels: find the most likely tokens.
    """

    def __init__(self, eos: frozenset[int], kernels: Kernels) -> None:
        self._eos, self._kernels = eos, kernels

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
        """logits [N, vocab] of any float type, one row for each sequence -> N tokens."""
        chosen = self._kernels.argmax(logits)
        # Rows that just want the most likely token are done; the others need float32.
        drawn = [
            row
            for row, one in enumerate(sequences)
            if one.sampling.temperature > 0 or self._edits(one)
        ]
        if drawn:
            picked = [sequences[row] for row in drawn]
            chosen[drawn] = self._choose(logits[drawn].float(), picked)
        wanted = [row for row, one in enumerate(sequences) if one.sampling.logprobs is not None]
        scored = {}
        if wanted:
            counts = [sequences[row].sampling.logprobs or 0 for row in wanted]
            scored = dict(zip(wanted, score(logits[wanted], chosen[wanted], counts), strict=True))
        return [scored.get(row, Sampled(token)) for row, token in enumerate(chosen.tolist())]

    def _choose(self, logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        """logits float32 [N, vocab], which change in place -> tokens [N]."""
        for row, sequence in enumerate(sequences):
            if self._edits(sequence):
                self._edit(logits[row], sequence)
        chosen = logits.argmax(-1)
        random = [row for row, one in enumerate(sequences) if one.sampling.temperature > 0]
        if random:
            picked = [sequences[row] for row in random]
            chosen[random] = _draw(logits[random], picked)
        return chosen

    def _edits(self, sequence: Sequence) -> bool:
        params = sequence.sampling
        return bool(
            params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1
            or params.logit_bias
            or sequence.num_outputs < params.min_tokens
        )

    def _edit(self, row: torch.Tensor, sequence: Sequence) -> None:
        """Apply penalties, bias and the minimum length to `row` [vocab], in place."""
        params = sequence.sampling
        if params.repetition_penalty != 1:
            seen = torch.tensor(sequence.tokens, device=row.device).unique()
            penalty = params.repetition_penalty
            row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        if sequence.num_outputs and (params.presence_penalty or params.frequency_penalty):
            outputs = torch.tensor(sequence.outputs, device=row.device)
            seen, counts = outputs.unique(return_counts=True)
            row[seen] -= params.presence_penalty + params.frequency_penalty * counts
        for token, bias in params.logit_bias.items():
            row[token] += bias
        if sequence.num_outputs < params.min_tokens:
            row[[*self._eos, *params.stop_token_ids]] = -torch.inf


def score(logits: torch.Tensor, tokens: torch.Tensor, top: list[int]) -> list[Sampled]:
    """Log-probability of tokens [N] under logits [N, vocab], and row i's `top[i]` most likely."""
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    best = logprobs.topk(max(top), -1) if max(top) else None
    rows = []
    for row, (token, logprob) in enumerate(zip(tokens.tolist(), own, strict=True)):
        ranked: tuple[tuple[int, float], ...] = ()
        if best is not None and top[row]:
            count = top[row]
            indices, values = best.indices[row, :count].tolist(), best.values[row, :count].tolist()
            ranked = tuple(zip(indices, values, strict=True))
        rows.append(Sampled(token, logprob, ranked))
    return rows


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Sample logits [N, vocab] by inverting each row's cumulative distribution at one uniform."""
    params = [sequence.sampling for sequence in sequences]
    temperature = _column([one.temperature for one in params], logits)
    # Near-zero temperatures: shift first, so that nothing overflows.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities = _truncate(torch.softmax(scaled, -1), params)
    cumulative = probabilities.double().cumsum(-1)
    uniform = [_uniform(sequence.seed, sequence.num_outputs) for sequence in sequences]
    targets = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None]
    targets = targets * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True)
    last = (probabilities > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(chosen, last)[:, 0]


def _truncate(probabilities: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Zero what top_k, top_p and min_p leave out of probabilities [N, vocab]."""
    rows = [row for row, one in enumerate(params) if one.top_k or one.top_p < 1 or one.min_p]
    if not rows:
        return probabilities
    filtered = _by_value if probabilities.device.type == "cpu" else _by_order
    result = probabilities.clone()
    result[rows] = filtered(probabilities[rows], [params[row] for row in rows])
    return result


def _by_order(probabilities: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """What the filters leave of probabilities [N, vocab]."""
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    stays, mass = _filter(ranked, params)
    left = torch.where(stays, ranked / mass, 0.0)
    return torch.zeros_like(left).scatter(-1, order, left)


def _by_value(probabilities: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The same, bit for bit, sooner on a CPU: numpy sorts values alone many times faster.

    Of a row its largest values are left, so the smallest of these tells which tokens they are; of
    several that have it, those that come first.
    """
    ranked = torch.from_numpy(np.sort(probabilities.numpy(), -1)).flip(-1)
    stays, mass = _filter(ranked, params)
    count = stays.sum(-1, keepdim=True)
    least = ranked.gather(-1, (count - 1).clamp(min=0))
    kept = probabilities >= least
    surplus = kept.sum(-1, keepdim=True) - count
    tied = surplus[:, 0].nonzero()[:, 0]
    if len(tied):
        equal = probabilities[tied] == least[tied]
        room = equal.sum(-1, keepdim=True) - surplus[tied]
        kept[tied] &= ~equal | (equal.cumsum(-1) <= room)
    return torch.where(kept, probabilities / mass, 0.0)


def _filter(
    ranked: torch.Tensor, params: list[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of probabilities [N, vocab], largest first, the filters leave.

    Returns:
        That, [N, vocab], and the mass [N, 1] of what top_k leaves.
    """
    vocab = ranked.shape[-1]
    rank = torch.arange(vocab, device=ranked.device)
    top_k = _column([one.top_k or vocab for one in params], ranked)
    top_p = _column([one.top_p for one in params], ranked)
    min_p = _column([one.min_p for one in params], ranked)
    # Each filter sees what the one before it left, renormalised; a token stays while the mass
    # before it is below top_p, so the most likely one always stays.
    among = rank < top_k
    ranked = torch.where(among, ranked, 0.0)
    mass = ranked.sum(-1, keepdim=True)
    ranked = ranked / mass
    before = ranked.cumsum(-1) - ranked
    among &= (before < top_p) | (rank == 0)
    return among & (ranked >= min_p * ranked[:, :1]), mass


def _column(values: Iterable[float], like: torch.Tensor) -> torch.Tensor:
    """values as float32 [N, 1] on the device of `like`."""
    return torch.tensor(list(values), dtype=torch.float32, device=like.device)[:, None]


def _uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1) that is a function of seed and position."""
    return float(np.random.Generator(np.random.Philox(key=[seed % 2**64, position])).random())
