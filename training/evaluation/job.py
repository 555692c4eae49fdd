"""The evaluation job: read bundle and data, measure, write figures, report and plots."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapter_gen.update import SharedBases
from cluster_router.wire.errors import BundleError, SetupError
from lm_workers.device import pick_device
from training.artefact import Artefact
from training.base import FrozenBase
from training.config import TrainSettings
from training.evaluation.curves import curves
from training.evaluation.evaluator import Evaluator, Measured, Subject
from training.evaluation.figures import GroupFigures
from training.evaluation.groups import GroupReader, unseen_kind
from training.evaluation.plots import draw
from training.evaluation.report import report
from training.evaluation.settings import SNAPSHOT_VARIANTS, VARIANTS, EvaluateSettings
from training.evaluation.store import Store


@dataclass(frozen=True)
class EvaluateJob:
    """Measures a trained bundle.

    Args:
        bundle: folder that a training run left.
        data: data folder, or a hub dataset (see `open_reader`).
        cache: folder of what was computed before.
        out: folder for evaluation.json, report.md, documents.jsonl and plots.
        settings: of the evaluation.
        holdout: folder of a bundle of the same recipe with domains held out, already evaluated:
            its figures on those domains are carried over, named as what they are.
        budget: folder of a bundle trained on the same tokens, whose static update alone has the
            hypernetwork's whole trainable budget.
        record: write the figures and the card into the bundle too.
    """

    bundle: Path
    data: str | Path
    cache: Path
    out: Path
    settings: EvaluateSettings = field(default_factory=EvaluateSettings)
    holdout: Path | None = None
    budget: Path | None = None
    record: bool = False

    def run(self) -> dict[str, Any]:
        """The figures, after they are written.

        Raises:
            BundleError: a bundle is damaged or of another model, `holdout` has no figures, or
                `budget` was trained on other tokens.
            ConfigError: the data cannot be used, or a variant is unknown.
            SetupError: a loss is NaN or infinite, or something cannot be written.
        """
        settings = Artefact.load(self.bundle, None).settings
        base = FrozenBase.resolve(settings.model, pick_device("auto"))
        artefact = Artefact.load(self.bundle, base.fingerprint)
        subject = self._subject(artefact, base)
        twin = None if self.holdout is None else twin_figures(self.holdout, settings)
        trained = artefact.record["domains"]
        reader = GroupReader.open(
            self.data, base, trained, settings.data, self.settings, self.cache
        )
        store = Store(self.cache / "evaluation" / artefact.bundle.hypernetwork_id)
        measured = Evaluator(base, subject, self.settings, store).measure(reader.groups())
        evaluation = self._figures(measured, subject, settings, base)
        if twin is not None:
            evaluation["twin"] = twin
        self._write(evaluation, measured)
        if self.record:
            artefact.with_evaluation(evaluation).replace(self.bundle)
        return evaluation

    def _subject(self, artefact: Artefact, base: FrozenBase) -> Subject:
        budget = None if self.budget is None else self._budget_static(artefact, base)
        return Subject(artefact.bundle, budget)

    def _budget_static(self, artefact: Artefact, base: FrozenBase) -> SharedBases:
        assert self.budget is not None
        other = Artefact.load(self.budget, base.fingerprint)
        for name in ("depth", "seed", "data", "static"):
            if getattr(other.settings, name) != getattr(artefact.settings, name):
                raise BundleError(
                    f"{self.budget} was trained with other settings of {name!r} than "
                    f"{self.bundle}; a baseline of the same tokens needs the same",
                    "budget",
                )
        return other.bundle.bases

    def _figures(
        self,
        measured: Sequence[Measured],
        subject: Subject,
        train: TrainSettings,
        base: FrozenBase,
    ) -> dict[str, Any]:
        protocol = self._protocol(measured, subject, train)
        evaluation = {"protocol": protocol | {"measured": _measured(base)}}
        for group in measured:
            evaluation[group.name] = self._report(group)
            if group.name == "unseen":
                held = [unseen_kind(w.domain, train.data) == "held out" for w in group.windows]
                if any(held):
                    evaluation["held_out"] = self._report(_part(group, held))
        return evaluation

    def _report(self, group: Measured) -> dict[str, Any]:
        seed = self.settings.seed
        figures = GroupFigures(group, self.settings.resamples, seed)
        return {**figures.report(), "curves": curves(group, figures, seed)}

    def _protocol(
        self, measured: Sequence[Measured], subject: Subject, train: TrainSettings
    ) -> dict[str, Any]:
        bundle = subject.bundle
        done = {name for group in measured for name in group.sums}
        streamed = any("refined" in group.sums for group in measured if group.name == "unseen")
        return {
            "bundle": bundle.hypernetwork_id,
            "base_model": bundle.base_model,
            "depth": bundle.spec.depth,
            "rank": bundle.spec.rank,
            "split": "test",
            "context_tokens": train.data.context_tokens,
            "scored_tokens": train.data.scored_tokens,
            "resamples": self.settings.resamples,
            "interval": "95 %, documents resampled within each domain; "
            "for means, domains resampled first",
            "primary": ["unseen", "refined_net" if streamed else "net"],
            "settings": self.settings.model_dump(mode="json"),
            "variants": {name: text for name, text in VARIANTS.items() if name in done},
            "left_out": dict(self._left_out(done)),
        }

    def _left_out(self, done: set[str]) -> Iterator[tuple[str, str]]:
        reasons = {"budget_static": "no bundle of the whole budget was named (--budget)"}
        for name in self.settings.chosen():
            if name not in done:
                why = "no group of documents arrived as a stream"
                yield name, reasons.get(name, "" if name in SNAPSHOT_VARIANTS else why)
        if self.settings.variants is not None:
            for name in VARIANTS:
                if name not in self.settings.chosen():
                    yield name, "not asked for"

    def _write(self, evaluation: dict[str, Any], measured: Sequence[Measured]) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            names, note = self._draw(evaluation)
            text = json.dumps(evaluation, indent=1, allow_nan=False) + "\n"
            (self.out / "evaluation.json").write_text(text, encoding="utf-8")
            (self.out / "report.md").write_text(report(evaluation, names, note), encoding="utf-8")
            lines = "".join(json.dumps(row) + "\n" for group in measured for row in _rows(group))
            (self.out / "documents.jsonl").write_text(lines, encoding="utf-8")
        except OSError as error:
            raise SetupError(
                f"cannot write the report to {self.out}: {error}; name another folder with --out",
                "out",
            ) from error

    def _draw(self, evaluation: dict[str, Any]) -> tuple[list[str], str | None]:
        try:
            return draw(evaluation, self.out / "plots"), None
        except SetupError as error:
            return [], error.message


def _measured(base: FrozenBase) -> dict[str, str]:
    """Where and when."""
    head = base.head
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(head.device) if head.is_cuda else cpu,
        "dtype": str(head.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def _part(group: Measured, chosen: Sequence[bool]) -> Measured:
    mask = np.array(chosen)
    return Measured(
        "held_out",
        [window for window, keep in zip(group.windows, chosen, strict=True) if keep],
        {name: sums[mask] for name, sums in group.sums.items()},
        [facts for facts, keep in zip(group.facts, chosen, strict=True) if keep],
    )


def _rows(group: Measured) -> Iterator[dict[str, Any]]:
    """One object a document, for analyses of one's own."""
    for index, (window, facts) in enumerate(zip(group.windows, group.facts, strict=True)):
        yield {
            "group": group.name,
            "domain": window.domain,
            "scored_tokens": window.scored,
            "scored_bytes": window.scored_bytes,
            **asdict(facts),
            "nats": {
                name: round(float(sums[index]), 4)
                for name, sums in group.sums.items()
                if np.isfinite(sums[index])
            },
        }


def twin_figures(path: Path, settings: TrainSettings) -> dict[str, Any]:
    """Figures on domains held out of the bundle at `path`, else trained like this one.

    Raises:
        BundleError: it has none, or was trained otherwise.
    """
    try:
        evaluation = json.loads((path / "evaluation.json").read_bytes())
        figures: dict[str, Any] = evaluation["held_out"]
        other = Artefact.load(path, None).settings
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(
            f"{path} has no figures of held-out domains: {error}; evaluate it with --record",
            "holdout",
        ) from error
    data = other.data.model_copy(update={"holdout": settings.data.holdout})
    # Any number of workers trains the same: see `training.shares`.
    place = {name: getattr(settings, name) for name in ("workers", "worker_cpus", "max_failures")}
    if other.model_copy(update={"data": data, **place}) != settings:
        raise BundleError(f"{path} was trained with other settings than this bundle", "holdout")
    return figures
