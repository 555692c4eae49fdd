"""The loop of one stage: best step kept, early stopping, a clear end when the loss explodes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.update import HEAD, Site, UpdateSpec
from cluster_router.wire.errors import SetupError
from training.checkpoints import Saved
from training.config import StageSettings
from training.modules import AdaptedHead, Batch, HeadBases
from training.optimise import Stage
from training.runtime import InProcess
from training.shares import Share, Split

DIM, VOCAB = 8, 12
SPEC = UpdateSpec("head", 2, DIM, (Site(HEAD, DIM, DIM),))


def _batch(scale: float = 1.0) -> Batch:
    hidden = scale * torch.ones(4, DIM)
    return Batch(hidden, torch.full((4,), 3), torch.zeros(4, dtype=torch.int64))


class OneToken:
    """Batches in which every target is token 3: a shift alone learns them.

    From step `broken` on the loss is no number.
    """

    def __init__(self, broken: int = 10**9) -> None:
        self.broken = broken

    def draw(self, step: int, split: Split) -> list[Share[Batch]]:
        batch = _batch(float("nan") if step >= self.broken else 1.0)
        part = 1 / split.accumulate
        return [Share(batch, 4, part, part, step) for _ in range(split.accumulate)]


class Recorder(InProcess):
    """Keeps what is reported."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []

    def save(self, stage: str, saved: Saved, metrics: Mapping[str, float]) -> None:
        self.steps.append(metrics["step"])


@pytest.fixture
def module() -> AdaptedHead:
    weight = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(0))
    return AdaptedHead(HeadBases(init_bases(SPEC, 0)), None, weight)


def _stage(module: AdaptedHead, **changes: object) -> Stage[Batch]:
    settings = StageSettings.model_validate(
        {"steps": 40, "learning_rate": 0.05, "evaluate_every": 5, "patience": 2, **changes}
    )
    return Stage("test", settings, module, [(module.bases, 1.0)])


def _loss(module: AdaptedHead) -> float:
    return float(module(_batch())[0].mean().detach())


def test_training_lowers_the_loss_and_reports_each_validation(module: AdaptedHead) -> None:
    before, recorder = _loss(module), Recorder()
    stage = _stage(module, patience=99)
    result = stage.run(OneToken(), lambda: _loss(module), recorder)
    assert result.best_loss == pytest.approx(_loss(module))
    assert result.best_loss < before / 2
    assert recorder.steps == list(range(5, 41, 5)) == [step for step, _, _ in result.curve]


def test_the_best_step_is_kept_and_patience_ends_the_stage(module: AdaptedHead) -> None:
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.6, 0.0])
    seen: list[torch.Tensor] = []

    def validate() -> float:
        seen.append(module.bases.shift.detach().clone())
        return next(losses)

    result = _stage(module).run(OneToken(), validate, InProcess())
    assert (result.best_loss, result.best_step, result.steps) == (3.0, 10, 20)
    assert torch.equal(module.bases.shift, seen[2])


def test_a_stage_that_never_improves_changes_nothing(module: AdaptedHead) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    losses = iter([1.0, 2.0, 3.0])
    result = _stage(module).run(OneToken(), lambda: next(losses), InProcess())
    assert result.best_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_loss_that_is_not_a_number_names_the_setting(module: AdaptedHead) -> None:
    with pytest.raises(SetupError, match="learning_rate"):
        _stage(module).run(OneToken(broken=1), lambda: 1.0, InProcess())
