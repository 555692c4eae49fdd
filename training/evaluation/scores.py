"""Losses of windows under updates, each computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from training.base import FrozenBase
from training.evaluation.store import Store
from training.evaluation.updates import Key, Task, digest, stack
from training.scoring import WindowScorer
from training.statistics import Array

_VERSION = 1
"""To be raised when the arithmetic of a score changes, so that old ones are not found again."""


class Work:
    """A progress bar in tokens through the model, over the whole evaluation."""

    def __init__(self) -> None:
        self._total = 0
        self._bar = tqdm(total=0, desc="evaluate", unit="tok", unit_scale=True)

    def plan(self, tokens: int) -> None:
        """`tokens` more are to go through the model."""
        self._total += tokens
        self._bar.total = self._total

    def label(self, text: str) -> None:
        """Say what is being done."""
        self._bar.set_description(text)

    def done(self, tokens: int) -> None:
        """`tokens` more went through the model."""
        self._bar.update(tokens)

    def spared(self, tokens: int) -> None:
        """`tokens` need not, for their result is known."""
        self._total -= tokens
        self._bar.total = self._total
        self._bar.refresh()

    def close(self) -> None:
        """End it: what is left of the plan was not needed after all."""
        self._bar.total = self._bar.n
        self._bar.refresh()
        self._bar.close()


class Scores:
    """Scores tasks and remembers them.

    Which windows share a forward pass depends on what is asked for and in which order, never on
    what is kept already: a run that was stopped and goes on computes the same bits.

    Args:
        base: the base model.
        store: where scores are kept.
        batch: windows in one forward pass.
        work: shows progress.
    """

    def __init__(self, base: FrozenBase, store: Store, batch: int, work: Work) -> None:
        self.base = base
        self.store = store
        self.work = work
        self._batch = batch
        self._asked: set[Key] = set()
        self._salt = digest(_VERSION, base.fingerprint, str(base.head.dtype))

    def key(self, *parts: object) -> Key:
        """Names a result that depends on `parts` and on the base model."""
        return digest(self._salt, *parts)

    def nats(self, tasks: Sequence[Task | None]) -> Array:
        """Summed loss float64 [N] over the scored tokens of each task; NaN where there is none."""
        keys = [None if task is None else self.key(task.key) for task in tasks]
        wanted = {
            key: task for key, task in zip(keys, tasks, strict=True) if key and task is not None
        }
        for chunk in self._chunks(wanted):
            self._score({key: wanted[key] for key in chunk})
        self._asked.update(wanted)
        return np.array([np.nan if key is None else self._known(key) for key in keys])

    def _known(self, key: Key) -> float:
        values = self.store.score(key)
        assert values is not None
        return values[0]

    def _chunks(self, wanted: dict[Key, Task]) -> list[list[Key]]:
        """Keys that can share a pass: of one family, of like length."""
        families: dict[Key, list[Key]] = defaultdict(list)
        for key, task in wanted.items():
            if key in self._asked:
                self.work.spared(len(task.window.tokens))
            else:
                families[task.update.family.key].append(key)
        chunks = []
        for members in families.values():
            members.sort(key=lambda key: len(wanted[key].window.tokens))
            chunks += [members[i : i + self._batch] for i in range(0, len(members), self._batch)]
        return chunks

    def _score(self, chunk: dict[Key, Task]) -> None:
        tasks = list(chunk.values())
        tokens = sum(len(task.window.tokens) for task in tasks)
        if all(self.store.score(key) is not None for key in chunk):
            self.work.spared(tokens)
            return
        family = tasks[0].update.family
        bases = family.load()
        generated = None
        if bases is not None:
            generated = stack([task.update.generated() for task in tasks])
        scorer = WindowScorer(self.base, family.spec, self._batch)
        sums = scorer.score([task.window for task in tasks], bases, generated)
        self.store.add({key: [float(value)] for key, value in zip(chunk, sums, strict=True)})
        self.work.done(tokens)
