"""A reproduction from text to figures: the published protocol, then the honest one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster_router.wire.errors import ConfigError
from training.base import FrozenBase
from training.paper.examples import Examples, Splits
from training.paper.figures import SeedRun, figures
from training.paper.models import Adapter, build_adapters, paper_spec, parameter_counts
from training.paper.prepare import Honest, Preparation, Published
from training.paper.scoring import Variant, mean_of_batches, mean_of_tokens, token_losses
from training.paper.settings import PaperSettings
from training.paper.text import Sources
from training.paper.train import Measure, train
from training.statistics import Array


class Reproduction:
    """One run of the command.

    Args:
        settings: of both protocols.
        sources: the text.
        cache: folder of computed states.

    Raises:
        ConfigError: the context is as long as a whole window.
        ModelError: the model cannot be had.
    """

    def __init__(self, settings: PaperSettings, sources: Sources, cache: Path) -> None:
        if settings.context >= settings.length:
            raise ConfigError(
                f"context {settings.context} leaves nothing of {settings.length} tokens to score; "
                "lower it",
                "context",
            )
        self._settings = settings
        self._sources = sources
        self._base = FrozenBase.resolve(settings.model)
        self._preparation = Preparation(settings, sources, self._base, cache)

    def run(self) -> dict[str, Any]:
        """The report as JSON values; see `training.paper.report` for its Markdown.

        Raises:
            ConfigError: a text is missing, empty or too short.
            SetupError: the cache cannot be written, or a loss became NaN.
        """
        published, honest = self._preparation.published(), self._preparation.honest()
        runs = [self._seed(seed, published, honest) for seed in self._settings.seeds]
        return {
            "settings": self._settings.model_dump(mode="json"),
            "text": self._facts(published, honest),
            "parameters": parameter_counts(self._base.model, self._settings),
            **figures(runs, honest.test),
        }

    def _facts(self, published: Published, honest: Honest) -> dict[str, Any]:
        test = self._sources.test
        return {
            "train": self._sources.train.name,
            "trains_on_wikitext": self._sources.trains_on_wikitext,
            "validation": self._sources.validation.name,
            "test": None if test is None else test.name,
            "train_lines": len(published.last.training.targets),
            "validation_lines": len(published.last.validation.targets),
            "lines_ending_in_padding": round(float(published.ends_padded.double().mean()), 4),
            "tokens_that_are_padding": round(published.padding, 4),
            "train_windows": len(honest.splits.training.targets),
            "validation_windows": len(honest.splits.validation.targets),
            "test_windows": len(honest.test.targets),
            "test_tokens": honest.test.targets.numel(),
        }

    def _seed(self, seed: int, published: Published, honest: Honest) -> SeedRun:
        settings = self._settings
        plan = (settings.batch, settings.kmeans_iterations, seed)
        last, every = published.last.batched(*plan), published.every.batched(*plan)
        test = honest.test.batched(*plan)
        by_paper, fair = self._adapters(seed), self._adapters(seed)
        other = {"lora_every": self._adapters(seed)["lora"]}
        curves = {
            "last_position": self._train(by_paper, last, mean_of_batches, seed, "last position"),
            "every_position": self._train(other, every, mean_of_batches, seed, "every position"),
            "honest": self._train(
                fair, honest.splits.batched(*plan), mean_of_tokens, seed, "honest loss"
            ),
        }
        published_models = _variants(by_paper | other)
        honest_models = _variants(fair)
        if len(test.batches) > 1:  # else there is no other batch to take a condition from
            honest_models["misled"] = Variant(fair["hyper"], misled=True)
        return SeedRun(
            seed=seed,
            curves=curves,
            published=self._published_figures(
                published_models, last.validation, every.validation, published.ends_padded
            ),
            transferred=self._sums(published_models, test, "test, published models"),
            honest=self._sums(honest_models, test, "test, honest models"),
        )

    def _adapters(self, seed: int) -> dict[str, Adapter]:
        torch.manual_seed(seed)
        return build_adapters(paper_spec(self._base.model, self._settings), self._settings.dropout)

    def _train(
        self,
        adapters: Mapping[str, Adapter],
        splits: Splits,
        measure: Measure,
        seed: int,
        label: str,
    ) -> dict[str, list[float]]:
        return train(adapters, splits, measure, self._base.head, self._settings, seed, label)

    def _published_figures(
        self,
        variants: Mapping[str, Variant],
        last: Examples,
        every: Examples,
        ends_padded: torch.Tensor,
    ) -> dict[str, dict[str, float | None]]:
        at_last = self._losses(variants, last, "validation, last position")
        at_every = self._losses(variants, every, "validation, every position")
        padded = ends_padded.numpy()
        return {
            name: {
                "last_position": mean_of_batches(at_last[name], last),
                "lines_ending_in_padding": _mean(at_last[name][padded]),
                "other_lines": _mean(at_last[name][~padded]),
                "every_position": mean_of_batches(at_every[name], every),
            }
            for name in variants
        }

    def _sums(
        self, variants: Mapping[str, Variant], test: Examples, label: str
    ) -> dict[str, Array]:
        losses = self._losses(variants, test, label)
        return {name: np.nansum(values, axis=1) for name, values in losses.items()}

    def _losses(
        self, variants: Mapping[str, Variant], examples: Examples, label: str
    ) -> dict[str, Array]:
        alpha = self._settings.alpha * self._settings.rank
        return token_losses(variants, examples, self._base.head, alpha, label)


def _variants(adapters: Mapping[str, Adapter]) -> dict[str, Variant]:
    return {"base": Variant(), **{name: Variant(adapter) for name, adapter in adapters.items()}}


def _mean(losses: Array) -> float | None:
    """Mean of what is scored, None where nothing is."""
    return None if np.isnan(losses).all() else float(np.nanmean(losses))
