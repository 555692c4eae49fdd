"""The loop of one stage: best step kept, early stopping, a clear end when the loss explodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapter_gen.apply import init_bases
from adapter_gen.update import HEAD, Site, UpdateSpec
from cluster_router.wire.errors import SetupError
from training.checkpoints import Saved, StageFiles
from training.config import StageSettings
from training.modules import AdaptedHead, Batch, HeadBases
from training.optimise import Stage
from training.runtime import InProcess
from training.shares import Share, Split, to_device

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
    return float(module(to_device(_batch(), module.weight.device))[0].mean().detach())


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
    with pytest.raises(SetupError, match=r"stage test is nan at step 1; .*learning_rate"):
        _stage(module).run(OneToken(broken=1), lambda: 1.0, InProcess())


def test_divergence_keeps_the_last_good_checkpoint_and_says_where(
    module: AdaptedHead, tmp_path: Path
) -> None:
    with pytest.raises(SetupError, match=f"step 13; .* is of step 10, in {tmp_path}"):
        _stage(module).run(OneToken(broken=13), lambda: _loss(module), InProcess(tmp_path))
    saved = StageFiles(tmp_path).load("test")
    assert saved is not None and not saved.finished
    assert saved.record["steps"] == 10
    assert all(tensor.isfinite().all() for tensor in saved.tensors.values())


def test_a_validation_loss_that_is_not_a_number_ends_the_stage(module: AdaptedHead) -> None:
    losses = iter([1.0, float("inf")])
    with pytest.raises(SetupError, match="validation loss of stage test is inf at step 5"):
        _stage(module).run(OneToken(), lambda: next(losses), InProcess())


class Noisy(nn.Module):
    """A linear model under dropout, beside a frozen part; its penalty is the batch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 1)
        self.frozen = nn.Linear(DIM, DIM)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in self.parameters():
                nn.init.normal_(parameter)

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        kept = nn.functional.dropout(self.frozen(batch), 0.3, self.training)
        return self.linear(kept).squeeze(1).square(), self.linear(batch).mean().square()


class Rows:
    """Random rows, a fifth of them in the first share of two."""

    def draw(self, step: int, split: Split) -> list[Share[Tensor]]:
        random = torch.Generator().manual_seed(step)
        rows = torch.randn(20, DIM, generator=random)
        parts = [rows] if split.accumulate == 1 else [rows[:4], rows[4:]]
        return [Share(part, 20, len(part) / 20, len(part) / 20, step) for part in parts]


def _noisy(**changes: object) -> tuple[Noisy, Stage[Tensor]]:
    module = Noisy()
    settings = {"steps": 30, "learning_rate": 0.05, "evaluate_every": 5, "patience": 9, **changes}
    groups = [(module.linear, 1.0)]
    return module, Stage("noisy", StageSettings.model_validate(settings), module, groups, 0.1)


def _held_out(module: Noisy) -> float:
    with torch.no_grad():
        return float(module(torch.ones(3, DIM))[0].mean())


def test_accumulated_shares_are_one_global_batch() -> None:
    curves = []
    for accumulate in (1, 2):
        module, stage = _noisy(accumulate=accumulate)
        module.eval()
        stage = Stage("noisy", stage.settings, module, [(module.linear, 1.0)])
        curves.append(stage.run(Rows(), lambda m=module: _held_out(m), InProcess()).curve)
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_bfloat16_rounds_the_same_descent() -> None:
    results = []
    for precision in ("fp32", "bf16"):
        module, stage = _noisy(precision=precision)
        results.append(stage.run(Rows(), lambda m=module: _held_out(m), InProcess()))
        assert module.linear.weight.dtype == torch.float32
    assert results[0].curve != results[1].curve
    assert results[0].best_loss == pytest.approx(results[1].best_loss, abs=0.1)


def _interrupted(folder: Path, after: int) -> None:
    """A run that is cut off in its validation number `after`."""
    module, stage = _noisy()
    left = iter(range(after))

    def validate() -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return _held_out(module)

    with pytest.raises(KeyboardInterrupt):
        stage.run(Rows(), validate, InProcess(folder))


def test_a_resumed_stage_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    module, stage = _noisy()
    expected = stage.run(Rows(), lambda: _held_out(module), InProcess())
    _interrupted(tmp_path, after=4)
    other, stage = _noisy()
    assert stage.run(Rows(), lambda: _held_out(other), InProcess(tmp_path)) == expected
    assert torch.equal(other.linear.weight, module.linear.weight)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    module, stage = _noisy()
    expected = stage.run(Rows(), lambda: _held_out(module), InProcess(tmp_path))
    other, stage = _noisy()
    broken = OneToken(broken=0)
    assert stage.run(broken, lambda: float("nan"), InProcess(tmp_path)) == expected  # type: ignore[arg-type]
    assert torch.equal(other.linear.weight, module.linear.weight)


def test_a_resumed_stage_may_go_on_more_carefully(tmp_path: Path) -> None:
    _interrupted(tmp_path, after=3)
    module, stage = _noisy(learning_rate=1e-9)
    result = stage.run(Rows(), lambda: _held_out(module), InProcess(tmp_path))
    losses = [loss for step, _, loss in result.curve if step >= 10]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


def test_frozen_parameters_are_in_no_checkpoint(tmp_path: Path) -> None:
    _interrupted(tmp_path, after=2)
    saved = StageFiles(tmp_path).load("noisy")
    assert saved is not None
    assert {"module.linear.weight", "best.linear.weight"} <= saved.tensors.keys()
    assert not any("frozen" in name for name in saved.tensors)


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    module, stage = _noisy()
    torch.manual_seed(7)
    stage.run(Rows(), lambda: _held_out(module), InProcess())
    assert torch.equal(torch.rand(3), expected)


def test_dropout_is_off_in_validation_and_back_on_afterwards() -> None:
    module, stage = _noisy()
    module.frozen.eval()
    modes = []

    def validate() -> float:
        modes.append(module.training)
        return _held_out(module)

    stage.run(Rows(), validate, InProcess())
    assert set(modes) == {False}
    assert (module.training, module.frozen.training) == (True, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_curve_of_the_cpu_and_hands_the_module_back(module: AdaptedHead) -> None:
    start = {name: value.clone() for name, value in module.state_dict().items()}
    curves = []
    for device in ("cpu", "cuda"):
        module.load_state_dict(start)
        runtime = InProcess()
        runtime.device = torch.device(device)
        curves.append(_stage(module).run(OneToken(), lambda: _loss(module), runtime).curve)
        assert module.bases.shift.device == module.weight.device == torch.device("cpu")
    for cpu, gpu in zip(*curves, strict=True):
        assert cpu == pytest.approx(gpu, rel=1e-3)
