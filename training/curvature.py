"""The loss around the static update to second order, as a function of a shift of the hidden state.

For a document with mean loss gradient g (by the hidden state), a shift s changes its loss by about
g s + s H s / 2, where H is the expected second derivative. It depends on the model's predictions
alone, so one matrix serves all documents. The best shift of any group of documents then takes one
linear solve, where gradient descent would need many noisy steps: the logits answer some directions
of the hidden state hundreds of times more strongly than others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from training.features import Features
from training.modules import AdaptedHead, Batch
from training.objective import CandidateSampler

_CHUNK = 256
_DOCUMENTS = 8


@dataclass(frozen=True, eq=False)
class Curvature:
    """Second-order model of the loss.

    Attributes:
        gradients: float32 [N, d], mean gradient of each document's loss by its hidden states.
        tokens: float32 [N], scored tokens of each document.
        hessian: float32 [d, d], expected second derivative by the hidden state.
    """

    gradients: Tensor
    tokens: Tensor
    hessian: Tensor

    @classmethod
    def measure(
        cls, module: AdaptedHead, features: Features, sampler: CandidateSampler | None, rows: int
    ) -> Curvature:
        """Measure at the static update that `module` holds.

        Args:
            module: the update and the frozen head.
            features: of the training set.
            sampler: of the candidates that gradients are computed over; None for the vocabulary.
            rows: scored tokens that the second derivative is averaged over.
        """
        return cls(
            gradients=_gradients(module, features, sampler),
            tokens=torch.tensor([float(window.scored) for window in features.windows]),
            hessian=_hessian(module, _sample(features, rows)),
        )

    def inverse(self, damping: float) -> Tensor:
        """(H + damping m I)^-1, float32 [d, d], with m the mean eigenvalue of H."""
        mean = self.hessian.diagonal().mean()
        return torch.linalg.inv(self.hessian + damping * mean * torch.eye(len(self.hessian)))

    def group_gradient(self, members: Tensor) -> Tensor:
        """Mean gradient per token [d] of the documents `members` int64 [n]."""
        tokens = self.tokens[members]
        return tokens @ self.gradients[members] / tokens.sum()


def _gradients(module: AdaptedHead, features: Features, sampler: CandidateSampler | None) -> Tensor:
    found = []
    with tqdm(total=features.tokens, desc="gradients", unit="tok", unit_scale=True) as progress:
        for start in range(0, len(features), _DOCUMENTS):
            indices = range(start, min(start + _DOCUMENTS, len(features)))
            found += _document_gradients(module, features, indices, sampler)
            progress.update(sum(features.windows[i].scored for i in indices))
    return torch.stack(found)


def _document_gradients(
    module: AdaptedHead, features: Features, indices: range, sampler: CandidateSampler | None
) -> list[Tensor]:
    hidden = torch.cat([features.hidden(i) for i in indices])
    targets = torch.cat([features.targets(i) for i in indices])
    candidates = None if sampler is None else sampler.draw(targets, indices.start)
    batch = Batch(hidden, targets, torch.zeros_like(targets), None, candidates)
    adapted = module.adapt(hidden).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(module.nll(adapted, batch).sum(), adapted)
    parts = gradient.split([features.windows[i].scored for i in indices])
    return [part.mean(0) for part in parts]


@torch.no_grad()
def _hessian(module: AdaptedHead, hidden: Tensor) -> Tensor:
    """Mean over tokens of W' (diag(p) - p p') W, without forming it for any one token."""
    weight = module.weight
    head = weight.float()
    mean_probability = torch.zeros(len(weight))
    outer = torch.zeros(weight.shape[1], weight.shape[1])
    for part in hidden.split(_CHUNK):
        logits = module.adapt(part).to(weight.dtype) @ weight.T
        probability = logits.float().softmax(dim=1)
        mean_probability += probability.sum(0)
        expected = probability @ head  # [n, d], the mean row of the head under the model
        outer += expected.T @ expected
    return ((head.T * mean_probability) @ head - outer) / len(hidden)


def _sample(features: Features, rows: int) -> Tensor:
    step = max(1, features.tokens // rows)
    parts = [features.hidden(index)[index % step :: step] for index in range(len(features))]
    return torch.cat(parts)
