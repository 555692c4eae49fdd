"""Variants that need a stream: each document is judged by contexts that arrived before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.base import FrozenBase
from training.data import Window
from training.evaluation.refinery import Refinery
from training.evaluation.settings import EXPENSIVE, EvaluateSettings
from training.evaluation.stream import NOBODY, Moment, Plan
from training.evaluation.updates import Family, Task, Update
from training.evaluation.variants import (
    Scored,
    dice,
    nearest_clusters,
    noise_of,
)

AT = "refined@"
"""Start of the names of variants that saw at most so many earlier contexts."""


class StreamUpdates:
    """Updates by clusters formed online.

    Args:
        refinery: of the bundle.
        plan: the stream.
        windows: the group that is scored.
        settings: of the evaluation.
    """

    def __init__(
        self, refinery: Refinery, plan: Plan, windows: Sequence[Window], settings: EvaluateSettings
    ) -> None:
        self.plan = plan
        self.moments = plan.of_windows(len(windows))
        self._refinery = refinery
        self._windows = windows
        self._settings = settings

    def stream(self, index: int) -> Update:
        """The hypernetwork's, not refined."""
        moment = self.moments[index]
        return self._refinery.generate(moment.conditioning(moment.cluster))

    def common(self, index: int) -> Update:
        """The hypernetwork's, and what all earlier arrivals have in common."""
        moment = self.moments[index]
        return self._start(moment, moment.cluster)

    def refined(self, index: int) -> Update:
        """As it would be served."""
        moment = self.moments[index]
        return self._of(moment, moment.cluster)

    def within(self, support: int) -> Callable[[int], Update]:
        """As `refined`, when at most `support` contexts of the cluster had been refined on."""

        def update(index: int) -> Update:
            refinement = self.moments[index].refinement
            found = None if refinement is None else refinement.within(support)
            if found is None:
                return self.common(index)
            return self._refinery.refined(self.plan, found)

        return update

    def shuffled(self, index: int) -> Update:
        """Of a random other cluster; of one that was refined, if there is one."""
        moment = self.moments[index]
        known = moment.known
        for pool in (known.refinements, known.members):
            others = sorted(set(pool) - {moment.cluster})
            if moment.cluster != NOBODY and others:
                chosen = dice(self._windows[index], self._settings.seed).integers(len(others))
                return self._of(moment, others[int(chosen)])
        return self.refined(index)

    def mean(self, index: int) -> Update:
        """The mean over all clusters that have had arrivals, by their number."""
        moment = self.moments[index]
        members = moment.known.members
        if not members:
            return self._refinery.static()
        updates = [self._of(moment, cluster) for cluster in members]
        return self._refinery.mean([float(len(found)) for found in members.values()], updates)

    def noise(self, index: int) -> Update:
        """Of the norm of `refined`, in a random direction."""
        window = self._windows[index]
        return noise_of(self._refinery, self.refined(index), window, self._settings.seed)

    def merge(self, index: int) -> Update:
        """The nearest clusters' updates, weighted by similarity."""
        moment = self.moments[index]
        if moment.cluster == NOBODY:
            return self._refinery.static()
        snapshot = moment.known.snapshot
        embedding = self.plan.arrivals.embeddings[moment.time]
        rows, weights = nearest_clusters(embedding, snapshot, self._settings)
        return self._refinery.mean(
            weights, [self._of(moment, int(snapshot.ids[row])) for row in rows]
        )

    def own(self, index: int) -> Update:
        """Refined on this document's own context alone."""
        return self._refinery.own(self._windows[index])

    def _of(self, moment: Moment, cluster: int) -> Update:
        refinement = moment.known.refinements.get(cluster)
        if refinement is not None:
            return self._refinery.refined(self.plan, refinement)
        return self._start(moment, cluster)

    def _start(self, moment: Moment, cluster: int) -> Update:
        if cluster == NOBODY:
            return self._refinery.static()
        conditioning = moment.conditioning(cluster)
        return self._refinery.start(self.plan, conditioning, moment.known.common)


@dataclass(frozen=True)
class Prompter:
    """Puts earlier contexts of a cluster in the prompt.

    Args:
        tokens: how many at most.
        separator: token ids between contexts.
    """

    tokens: int
    separator: tuple[int, ...]

    @classmethod
    def of(
        cls, base: FrozenBase, windows: Sequence[Window], settings: EvaluateSettings
    ) -> Prompter:
        """As much as fits in the base model's context beside the longest window."""
        longest = max(len(window.tokens) for window in windows)
        most = int(getattr(base.model.config, "max_position_embeddings", 2048)) - longest
        ids = base.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        return cls(min(settings.context_prompt_tokens, most), tuple(ids))

    def latest(self, plan: Plan, moment: Moment) -> list[Window]:
        """The latest earlier arrivals of the cluster whose contexts fit, oldest first."""
        room, chosen = self.tokens, []
        for time in reversed(moment.support):
            room -= len(plan.arrivals.windows[time].content_tokens) + len(self.separator)
            if room < 0:
                break
            chosen.append(time)
        return plan.contexts(chosen[::-1])

    def prompt(self, window: Window, plan: Plan, moment: Moment) -> Window:
        """The window after earlier contexts; the same tokens are scored."""
        parts = [window.tokens[: window.lead]]
        for earlier in self.latest(plan, moment):
            parts += [earlier.content_tokens, np.array(self.separator, np.int32)]
        tokens = np.concatenate([*parts, window.tokens[window.lead :]]).astype(np.int32)
        return replace(window, tokens=tokens, context=len(tokens) - window.scored)


def last_of_each_domain(plan: Plan, windows: Sequence[Window], count: int) -> list[bool]:
    """Which windows are among the last `count` of their domain to arrive."""
    times = [moment.time for moment in plan.of_windows(len(windows))]
    chosen = [False] * len(windows)
    for domain in {window.domain for window in windows}:
        own = [index for index, window in enumerate(windows) if window.domain == domain]
        for index in sorted(own, key=times.__getitem__)[-count:]:
            chosen[index] = True
    return chosen


@dataclass(frozen=True, eq=False)
class StreamSetting:
    """What the variants of a stream are made of.

    Attributes:
        updates: by clusters formed online.
        random: by a random partition.
        static: the baseline.
        prompter: puts contexts in the prompt.
        expensive: which windows the expensive variants are measured on.
        oracle: fine-tunes on the true domain's earlier contexts.
    """

    updates: StreamUpdates
    random: StreamUpdates | None
    static: Family
    prompter: Prompter
    expensive: Sequence[bool]
    oracle: Callable[[int], Update]


def stream_variants(
    names: Sequence[str],
    setting: StreamSetting,
    windows: Sequence[Window],
    settings: EvaluateSettings,
) -> list[Scored]:
    """Those of `names` that are a task for each window of a stream."""
    updates, static = setting.updates, Update.static(setting.static)
    makers: dict[str, Callable[[int], Update]] = {
        "stream": updates.stream,
        "refined_common": updates.common,
        "refined": updates.refined,
        "refined_shuffled": updates.shuffled,
        "refined_mean": updates.mean,
        "refined_noise": updates.noise,
        "refined_merge": updates.merge,
        "refined_own": updates.own,
        "oracle": setting.oracle,
    }
    if setting.random is not None:
        makers["refined_random"] = setting.random.refined
    if "refined" in names:
        sizes = settings.stream.support_sizes
        makers |= {f"{AT}{size}": updates.within(size) for size in sizes}
        names = [*names, *(f"{AT}{size}" for size in sizes)]
    variants = []
    for name in names:
        chosen = setting.expensive if name in EXPENSIVE or name.startswith(AT) else None
        measured = [i for i in range(len(windows)) if chosen is None or chosen[i]]
        tasks: list[Task | None] = [None] * len(windows)
        for i in measured:
            if name == "in_context":
                plan, moment = updates.plan, updates.moments[i]
                tasks[i] = Task(setting.prompter.prompt(windows[i], plan, moment), static)
            elif name in makers:
                tasks[i] = Task(windows[i], makers[name](i))
        if any(task is not None for task in tasks):
            variants.append(Scored(name, tasks))
    return variants
