"""The oracle: a whole LoRA fine-tuned on the same support, early-stopped on a part of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from adapter_gen.language_model import AdaptedLM, ScoredTokens
from adapter_gen.update import SharedBases
from cluster_router.wire.errors import SetupError
from training.data import Window
from training.evaluation.scores import Scores
from training.evaluation.settings import OracleSettings
from training.evaluation.stream import Plan
from training.evaluation.updates import Family, Key, Update, digest

_TRAINING_COST = 3
"""Forward passes that a step of training costs."""

Context = np.ndarray


class OracleTuner:
    """Fine-tunes U, V, S0 and the shift of the static update.

    Args:
        static: what it starts from.
        settings: how.
        scores: base model, store and progress.
        seed: of the order of contexts.
    """

    def __init__(self, static: Family, settings: OracleSettings, scores: Scores, seed: int) -> None:
        self._static = static
        self._settings = settings
        self._scores = scores
        self._seed = seed
        self._latest: tuple[Key, SharedBases] | None = None

    def tuned(self, contexts: Sequence[Context]) -> Update:
        """The static update fine-tuned on `contexts`, when it is needed."""
        if len(contexts) < 2:
            return Update.static(self._static)
        key = self._scores.key(
            "oracle",
            self._static.key,
            self._settings.model_dump_json(),
            self._seed,
            digest(*contexts),
        )
        family = Family(key, self._static.spec, lambda: self._load(key, contexts))
        return Update.static(family)

    def cost(self, contexts: Sequence[Context]) -> int:
        """Tokens through the model, about, that fine-tuning takes."""
        settings = self._settings
        mean = sum(len(context) for context in contexts) / max(1, len(contexts))
        steps = _TRAINING_COST * settings.steps * min(settings.batch, len(contexts)) * mean
        looks = 1 + settings.steps // settings.evaluate_every
        return int(steps + looks * settings.held_back * len(contexts) * mean)

    def _load(self, key: Key, contexts: Sequence[Context]) -> SharedBases:
        if self._latest is None or self._latest[0] != key:
            self._latest = (key, self._make(key, contexts))
        return self._latest[1]

    def _make(self, key: Key, contexts: Sequence[Context]) -> SharedBases:
        store, work = self._scores.store, self._scores.work
        kept = store.tensors(key)
        if kept is not None:
            work.spared(self.cost(contexts))
            return bases_of(kept[0])
        tensors, loss = self._tune(contexts)
        store.add_tensors(key, tensors, {"held_back_loss": repr(loss)})
        work.done(self.cost(contexts))
        return bases_of(tensors)

    def _tune(self, contexts: Sequence[Context]) -> tuple[dict[str, torch.Tensor], float]:
        """The tensors with the lowest held-back loss, and that loss in nats per token."""
        settings = self._settings
        random = np.random.default_rng([self._seed, len(contexts)])
        shuffled = [contexts[i] for i in random.permutation(len(contexts))]
        held = max(1, round(settings.held_back * len(shuffled)))
        kept, learned = shuffled[:held], shuffled[held:]
        start = self._static.load()
        assert start is not None
        live = {name: value.clone().requires_grad_() for name, value in _tensors(start).items()}
        optimiser = torch.optim.Adam(live.values(), lr=settings.learning_rate)
        best, lowest, worse = _copy(live), self._loss(kept, live), 0
        for step, batch in enumerate(_batches(learned, settings), start=1):
            loss = self._losses(batch, live).mean()
            if not torch.isfinite(loss):
                raise SetupError(f"the oracle met a loss of {loss.item()} at step {step}")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % settings.evaluate_every == 0:
                found = self._loss(kept, live)
                worse = 0 if found < lowest else worse + 1
                if found < lowest:
                    best, lowest = _copy(live), found
                if worse == settings.patience:
                    break
        return best, lowest

    @torch.no_grad()
    def _loss(self, contexts: Sequence[Context], tensors: dict[str, torch.Tensor]) -> float:
        size = self._settings.batch
        parts = [
            self._losses(contexts[i : i + size], tensors) for i in range(0, len(contexts), size)
        ]
        return float(torch.cat(parts).double().mean())

    def _losses(
        self, contexts: Sequence[Context], tensors: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        sequences = [torch.from_numpy(context.astype(np.int64)) for context in contexts]
        scored = ScoredTokens.of(sequences, [1] * len(sequences))
        lm = AdaptedLM(self._scores.base.model, self._static.spec)
        return lm.losses(scored, bases_of(tensors))


def domain_contexts(
    plan: Plan, windows: Sequence[Window], expensive: Sequence[bool], most: int
) -> dict[str, list[Context]]:
    """By domain, the latest contexts that arrived before any document it is measured on.

    At most `most`, as many as a refinement may learn from.
    """
    moments = plan.of_windows(len(windows))
    first: dict[str, int] = {}
    for window, moment, chosen in zip(windows, moments, expensive, strict=True):
        if chosen:
            first[window.domain] = min(moment.time, first.get(window.domain, moment.time))
    return {
        domain: [
            window.context_tokens
            for window in plan.arrivals.windows[:time]
            if window.domain == domain
        ][-most:]
        for domain, time in first.items()
    }


def _batches(contexts: Sequence[Context], settings: OracleSettings) -> Iterator[list[Context]]:
    size = min(settings.batch, len(contexts))
    for step in range(settings.steps):
        yield [contexts[(step * size + i) % len(contexts)] for i in range(size)]


def _tensors(bases: SharedBases) -> dict[str, torch.Tensor]:
    named = {"s0": bases.s0, "shift": bases.shift}
    named |= {f"u.{index}": tensor for index, tensor in enumerate(bases.u)}
    return named | {f"v.{index}": tensor for index, tensor in enumerate(bases.v)}


def bases_of(tensors: dict[str, torch.Tensor]) -> SharedBases:
    """Bases from tensors named u.0, v.0, ..., s0, shift."""
    count = sum(name.startswith("u.") for name in tensors)
    return SharedBases(
        u=tuple(tensors[f"u.{index}"] for index in range(count)),
        v=tuple(tensors[f"v.{index}"] for index in range(count)),
        s0=tensors["s0"],
        shift=tensors["shift"],
    )


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
