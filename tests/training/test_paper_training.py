"""Training of the paper's adapters, and the whole command on a tiny random model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_gen.update import Site, UpdateSpec
from cluster_router.wire.errors import SetupError
from training.cli import main
from training.paper.examples import Examples, Splits
from training.paper.models import Adapter, BatchHypernetwork, StaticLora, build_adapters
from training.paper.scoring import Variant, mean_of_tokens, rows_of, token_losses
from training.paper.settings import PUBLISHED_LOSS, PaperSettings
from training.paper.train import train

VOCAB, DIM = 40, 12
SPEC = UpdateSpec("paper", 4, DIM, (Site("lm_head", DIM, VOCAB),), alpha=4.0)
SETTINGS = PaperSettings(
    model="none", batch=8, epochs=20, learning_rate=0.02, positions=4, dropout=0.0
)


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(0))


def two_kinds(count: int, seed: int) -> Examples:
    """Texts of two kinds, told apart by their embedding alone, each with its own next token."""
    dice = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % 2
    embeddings = torch.eye(DIM)[kind]
    hidden = torch.randn(count, 6, DIM, generator=dice)
    hidden[..., 0] = 3.0  # what all states share, so that B A h can be a bias
    targets = torch.where(kind == 0, 3, 7)[:, None].expand(-1, 6).contiguous()
    return Examples(hidden, targets, embeddings).batched(8, 5, seed=0)


@pytest.fixture
def splits() -> Splits:
    return Splits(two_kinds(64, 0), two_kinds(16, 1))


def adapters(seed: int = 0) -> dict[str, Adapter]:
    torch.manual_seed(seed)
    return build_adapters(SPEC, SETTINGS.dropout)


def test_untrained_adapters_change_nothing(head: torch.Tensor, splits: Splits) -> None:
    variants = {"base": Variant()} | {name: Variant(a) for name, a in adapters().items()}
    losses = token_losses(variants, splits.training, head, SPEC.alpha)
    assert (losses["lora"] == losses["base"]).all()
    assert (losses["hyper"] == losses["base"]).all()


@pytest.mark.parametrize("name", ["lora", "hyper"])
def test_gradients_gathered_in_chunks_are_those_of_the_whole(name: str, head: torch.Tensor) -> None:
    dice = torch.Generator().manual_seed(1)
    hidden = torch.randn(200, DIM, generator=dice)
    targets = torch.randint(VOCAB, (200,), generator=dice)
    adapter, condition = adapters()[name], torch.randn(DIM, generator=dice)

    def gradients(chunked: bool) -> list[torch.Tensor]:
        adapter.zero_grad()
        update = adapter(condition)
        leaf = update.leaf()
        used = leaf if chunked else update
        losses = [rows.nll(used, SPEC.alpha) for rows in rows_of(hidden, targets, head)]
        torch.cat(losses).mean().backward()
        if chunked:
            update.continue_from(leaf)
        return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.shape


def test_the_hypernetwork_tells_batches_apart_and_the_lora_cannot(
    head: torch.Tensor, splits: Splits
) -> None:
    trained = adapters()
    curves = train(trained, splits, mean_of_tokens, head, SETTINGS, 0, "test")
    assert min(curves["lora"]) == pytest.approx(math.log(2), abs=0.02), "one guess for both kinds"
    assert min(curves["hyper"]) < 0.01
    variants = {
        "hyper": Variant(trained["hyper"]),
        "misled": Variant(trained["hyper"], misled=True),
    }
    losses = token_losses(variants, splits.validation, head, SPEC.alpha)
    assert losses["misled"].mean() > 5


def test_adapters_are_left_at_their_best_epoch(head: torch.Tensor, splits: Splits) -> None:
    trained = adapters()
    settings = SETTINGS.model_copy(update={"learning_rate": 0.5, "epochs": 8})
    curves = train(trained, splits, mean_of_tokens, head, settings, 0, "test")
    for name, adapter in trained.items():
        losses = token_losses({name: Variant(adapter)}, splits.validation, head, SPEC.alpha)
        loss = mean_of_tokens(losses[name], splits.validation)
        assert len(curves[name]) == 8
        assert loss == pytest.approx(min(curves[name]), abs=1e-6)


def test_lockstep_changes_nothing(head: torch.Tensor, splits: Splits) -> None:
    """An adapter trained beside another ends where it ends alone."""
    together = adapters()
    alone = {"lora": adapters()["lora"]}
    both = train(together, splits, mean_of_tokens, head, SETTINGS, 0, "test")
    one = train(alone, splits, mean_of_tokens, head, SETTINGS, 0, "test")
    assert both["lora"] == one["lora"]


def test_dropout_only_while_training() -> None:
    module = BatchHypernetwork(SPEC, 0.5)
    torch.nn.init.ones_(module.network.last.weight)
    condition = torch.randn(DIM, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(module.train()(condition).a, module(condition).a)
    assert torch.equal(module.eval()(condition).a, module(condition).a)


def test_a_loss_that_is_not_a_number_stops_the_run(head: torch.Tensor, splits: Splits) -> None:
    broken = StaticLora(SPEC)
    torch.nn.init.constant_(broken.b, float("nan"))
    with pytest.raises(SetupError, match="--learning-rate"):
        train({"lora": broken}, splits, mean_of_tokens, head, SETTINGS, 0, "test")


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "Paris", "France"]


def _text(path: Path, seed: int) -> Path:
    dice = random.Random(seed)
    lengths = [dice.choice((4, 12, 300)) for _ in range(24)]
    path.write_text("\n\n".join(" ".join(dice.choices(WORDS, k=n)) for n in lengths))
    return path


@pytest.fixture(scope="module")
def outcome(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """The JSON and the Markdown of a run of the command."""
    root = tmp_path_factory.mktemp("paper")
    options = {
        "--model": tiny_llama,
        "--train": _text(root / "train.txt", 0),
        "--validation": _text(root / "valid.txt", 1),
        "--test": _text(root / "test.txt", 2),
        "--out": root / "out",
        "--cache": root / "cache",
        "--seeds": 2,
        "--epochs": 10,
        "--learning-rate": 0.02,
    }
    arguments = [str(part) for option in options.items() for part in option]
    assert main(["reproduce-paper", "--quick", *arguments]) == 0
    report = json.loads((root / "out" / "report.json").read_text())
    return report, (root / "out" / "report.md").read_text()


def test_the_published_loss_falls_and_most_of_the_lines_end_in_padding(
    outcome: tuple[dict[str, Any], str],
) -> None:
    report, _ = outcome
    table = report["published_protocol"]
    assert table["lora"]["last_position"] < table["base"]["last_position"] - 0.5
    assert table["hyper"]["last_position"] < table["base"]["last_position"] - 0.5
    assert 0 < report["text"]["lines_ending_in_padding"] < 1
    assert set(table) == {"base", "lora", "lora_every", "hyper"}
    by_seed = [run["published_protocol"]["lora"]["last_position"] for run in report["runs"]]
    assert table["lora"]["last_position"] == pytest.approx(sum(by_seed) / 2, abs=1e-4)
    curve = report["runs"][0]["curves"]["last_position"]["lora"]
    assert by_seed[0] == pytest.approx(min(curve), abs=1e-6), "the best epoch is what is printed"


def test_the_honest_tables_tell_the_same_models_apart(outcome: tuple[dict[str, Any], str]) -> None:
    report, _ = outcome
    transferred = report["published_models_honest_loss"]
    honest = report["honest_models_honest_loss"]
    assert transferred["nats_per_token"]["base"] == honest["nats_per_token"]["base"]
    assert honest["nats_per_token"]["lora"] < transferred["nats_per_token"]["lora"]
    estimate, low, high = honest["gains"]["lora"]
    assert low <= estimate <= high
    difference = honest["nats_per_token"]["base"] - honest["nats_per_token"]["lora"]
    assert estimate == pytest.approx(difference, abs=2e-5)
    assert set(honest["gains"]) == {"lora", "hyper", "net"}, "one batch: no other's condition"


def test_the_report_names_the_setting_and_the_published_figures(
    outcome: tuple[dict[str, Any], str],
) -> None:
    _, text = outcome
    assert "another setting: the model is not GPT-2 small; only some of the lines" in text
    for figure in (*PUBLISHED_LOSS.values(), "124,439,808", "204,100", "6,786,596"):
        assert str(figure) in text
    assert "{" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data"),
        (["--data", "nowhere"], "wikitext-2"),
        (["--data", ".", "--train", "a"], "--data"),
        (["--train", "a", "--validation", "b", "--epochs", "0"], "--epochs"),
        (["--train", "a", "--validation", "b", "--seeds", "0"], "--seeds"),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce-paper", *arguments]) == 2
    assert message in capsys.readouterr().err
