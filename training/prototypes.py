"""Prototypes: the static update's cores, refined on the training text of each cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapter_gen.refine import Prompt, Refiner
from adapter_gen.update import SharedBases, UpdateSpec
from training.base import FrozenBase
from training.checkpoints import Saved
from training.clustering import Clustering
from training.clusters import assign
from training.config import TrainSettings
from training.data import Window
from training.progress import Progress
from training.runtime import Runtime

_STAGE = "prototypes"


class Prototypes:
    """Refines one update per cluster. Workers take clusters in turn and pool what they found.

    Args:
        base: the frozen model.
        spec: shape of the updates.
        bases: the trained shared parts.
        settings: of the run.
        runtime: this process, or one worker of several.
    """

    def __init__(
        self,
        base: FrozenBase,
        spec: UpdateSpec,
        bases: SharedBases,
        settings: TrainSettings,
        runtime: Runtime,
    ) -> None:
        self._refiner = Refiner(base.model, spec, bases, settings.prototypes.refine, settings.seed)
        self._spec = spec
        self._settings = settings
        self._runtime = runtime

    def refine(
        self, windows: Sequence[Window], clustering: Clustering
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Cores float32 [K, sites, r, r], and how it went for each cluster (JSON values).

        Raises:
            DeltaError: a refinement met NaN or infinity.
        """
        rank, count = self._spec.rank, len(clustering.snapshot)
        cores = torch.zeros(count, len(self._spec.sites), rank, rank)
        figures = torch.zeros(count, 3)  # scale, gain, tokens
        rows = assign(clustering.train, clustering.snapshot)
        done = 0
        if (saved := self._runtime.load(_STAGE)) is not None:
            cores, figures = saved.tensors["cores"], saved.tensors["figures"]
            done = int(saved.record["done"])
        with Progress(_STAGE, count, done, shown=self._runtime.rank == 0) as progress:
            while done < count:
                last = min(done + self._runtime.world, count)
                tokens = self._round(windows, rows, range(done, last), cores, figures)
                done = last
                saved = Saved(
                    {"cores": cores, "figures": figures}, {"done": done}, finished=done == count
                )
                self._runtime.save(_STAGE, saved, {"gain": float(figures[:done, 1].mean())})
                progress.step(tokens)
        return cores, [
            {"scale": round(scale, 4), "gain": round(gain, 5), "tokens": int(tokens)}
            for scale, gain, tokens in figures.tolist()
        ]

    def _round(
        self,
        windows: Sequence[Window],
        rows: np.ndarray[Any, Any],
        clusters: range,
        cores: Tensor,
        figures: Tensor,
    ) -> int:
        """One cluster in each worker, written into `cores` and `figures` of all of them."""
        device = self._runtime.device
        found = torch.zeros(len(clusters), *cores.shape[1:])
        numbers = torch.zeros(len(clusters), 3)
        if (own := self._runtime.rank) < len(clusters):
            refined = self._refiner.refine(self._prompts(windows, rows, clusters[own]))
            assert refined.generated.cores is not None
            found[own] = refined.generated.cores[0].cpu()
            numbers[own] = torch.tensor([refined.scale, refined.gain, float(refined.tokens)])
        cores[clusters.start : clusters.stop] = self._runtime.total(found.to(device)).cpu()
        pooled = self._runtime.total(numbers.to(device)).cpu()
        figures[clusters.start : clusters.stop] = pooled
        return int(pooled[:, 2].sum())

    def _prompts(
        self, windows: Sequence[Window], rows: np.ndarray[Any, Any], cluster: int
    ) -> list[Prompt]:
        settings = self._settings.prototypes
        members = np.flatnonzero(rows == cluster)
        random = np.random.default_rng([self._settings.seed, cluster])
        chosen = random.permutation(members)[: settings.documents]
        return [windows[i].tokens[: windows[i].lead + settings.tokens] for i in chosen]
