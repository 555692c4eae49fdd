"""A run at depth `full`, on a tiny random model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from adapter_gen.hypernetwork import MemoryHypernetwork
from adapter_gen.language_model import AdaptedLM, ScoredTokens
from cluster_router.wire.errors import ConfigError
from lm_workers.models import load_tokenizer
from training.artefact import Artefact
from training.base import FrozenBase
from training.config import TrainSettings, load_settings
from training.corpus import Corpus
from training.data import Window
from training.dialogue import DialogueCutter
from training.full import FullBases, StaticLM, WindowBatches
from training.jobs import TrainJob
from training.runtime import InProcess
from training.scoring import WindowScorer
from training.shares import Seed, Split


@pytest.fixture(scope="module")
def full(settings: TrainSettings) -> TrainSettings:
    stage = {"steps": 60, "documents": 8, "positions": 48, "evaluate_every": 20}
    changes = {
        "depth": "full",
        "hypernetwork": {"kind": "memory", "kappa": 0.0},
        "static": {**stage, "candidates": None, "learning_rate": 0.02},
        "prototypes": {
            "documents": 16,
            "tokens": 64,
            "sharpness": [32.0],
            "refine": {"steps": 6, "batch": 8, "learning_rate": 0.1},
        },
    }
    return TrainSettings.model_validate({**settings.model_dump(), **changes})


@pytest.fixture(scope="module")
def trained(
    full: TrainSettings, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The folder of a trained bundle and the cache it used. Read only."""
    folder = tmp_path_factory.mktemp("full")
    TrainJob(full, data, folder / "cache", "a test").run(InProcess()).save(folder / "bundle")
    return folder / "bundle", folder / "cache"


def test_each_part_lowers_the_loss_of_held_out_documents(
    trained: tuple[Path, Path], base: FrozenBase, data: Path
) -> None:
    path, cache = trained
    artefact = Artefact.load(path, base.fingerprint)
    bundle = artefact.bundle
    assert bundle.spec.depth == "full"
    corpus = Corpus.open(data, artefact.settings.data, base, cache)
    windows = corpus.windows("test", corpus.domains.seen)
    scorer = WindowScorer(base, bundle.spec)
    unadapted = scorer.score(windows, None).sum()
    static = scorer.score(windows, bundle.bases).sum()
    assert static < 0.9 * unadapted
    blends = artefact.record["blends"]
    assert [blend["strength"] for blend in blends] == [0.0, 0.5, 1.0, 0.5, 1.0]
    best = min(blends, key=lambda blend: blend["loss"])
    assert best["loss"] < blends[0]["loss"], "the memory gains on validation documents"
    memory = bundle.hypernetwork
    assert isinstance(memory, MemoryHypernetwork)
    assert float(memory.sharpness) == best["sharpness"]
    assert float(memory.strength) == best["strength"]
    assert any(entry["scale"] > 0 for entry in artefact.record["prototypes"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_trains_with_the_model_on_a_gpu(full: TrainSettings, data: Path, tmp_path: Path) -> None:
    assert full.clusters.token_weights == "idf"
    few = full.model_copy(update={"static": full.static.model_copy(update={"steps": 5})})
    runtime = InProcess()
    assert runtime.device.type == "cuda"
    artefact = TrainJob(few, data, tmp_path / "cache", "a test").run(runtime)
    assert artefact.bundle.token_weights is not None
    assert all(u.device.type == "cpu" for u in artefact.bundle.bases.u)
    assert FrozenBase.resolve(full.model, "cuda").embedding.device.type == "cpu"


def test_with_no_strengths_every_cluster_gets_the_static_update(
    full: TrainSettings, trained: tuple[Path, Path], data: Path
) -> None:
    alone = full.model_copy(
        update={
            "static": full.static.model_copy(update={"steps": 20}),
            "prototypes": full.prototypes.model_copy(update={"strengths": ()}),
        }
    )
    artefact = TrainJob(alone, data, trained[1], "a test").run(InProcess())
    assert artefact.record["prototypes"] == []
    assert [blend["strength"] for blend in artefact.record["blends"]] == [0.0]
    snapshot = artefact.bundle.snapshot
    support = torch.full((len(snapshot),), 100.0)
    generated = artefact.bundle.hypernetwork(torch.from_numpy(snapshot.conditioning), support)
    assert generated.cores is not None
    assert not generated.cores.any()


def test_a_stopped_run_goes_on_where_it_was(
    full: TrainSettings, trained: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    class Stop(InProcess):
        def save(self, stage, saved, metrics):  # type: ignore[no-untyped-def]
            super().save(stage, saved, metrics)
            if stage == "prototypes" and saved.record["done"] == 2:
                raise KeyboardInterrupt

    job = TrainJob(full, data, trained[1], "a test")
    with pytest.raises(KeyboardInterrupt):
        job.run(Stop(tmp_path / "partial"))
    resumed = job.run(InProcess(tmp_path / "partial"))
    whole = Artefact.load(trained[0], None)
    assert resumed.record == whole.record
    assert resumed.bundle.hypernetwork_id == whole.bundle.hypernetwork_id


def test_the_update_starts_at_zero_and_only_the_bases_learn(base: FrozenBase) -> None:
    spec = base.spec("full", 4)
    bases = FullBases(spec, 0)
    lm = AdaptedLM(base.model, spec)
    batch = ScoredTokens.of([torch.arange(5, 25)], [1])
    module = StaticLM(bases, lm)
    losses, penalty = module(batch)
    torch.testing.assert_close(losses, lm.losses(batch, None))
    assert float(penalty) == 0
    assert not any("model" in name for name in module.state_dict())
    losses.mean().backward()
    assert all(u.grad is not None and u.grad.any() for u in bases.u)


def windows(count: int) -> list[Window]:
    random = np.random.default_rng(0)
    lengths = random.integers(4, 40, count)
    return [Window(np.arange(n, dtype=np.int32), 2, "d", int(n)) for n in lengths]


def test_an_epoch_has_every_window_once_and_like_lengths_together() -> None:
    made = windows(64)
    batches = WindowBatches(made, documents=4, positions=8, seed=Seed(0, "static"))
    shares = [batches.draw(step, Split())[0] for step in range(1, 17)]
    rows = [row for share in shares for row in share.batch.tokens]
    lengths = Counter(int((row > 0).sum()) + 1 for row in rows)
    assert lengths == Counter(len(window.tokens) for window in made)
    waste = sum(int((share.batch.tokens[:, 1:] == 0).sum()) for share in shares)
    assert waste < 0.1 * sum(share.batch.tokens.numel() for share in shares)


def test_two_workers_share_what_one_would_take() -> None:
    batches = WindowBatches(windows(32), documents=4, positions=8, seed=Seed(0, "static"))
    for step in (1, 5, 9):
        (whole,) = batches.draw(step, Split())
        halves = [batches.draw(step, Split(rank, 2))[0] for rank in (0, 1)]
        assert sum(half.of_tokens for half in halves) == pytest.approx(1)
        targets = torch.cat([half.batch.targets for half in halves])
        torch.testing.assert_close(targets, whole.batch.targets)


def test_depth_and_hypernetwork_have_to_fit(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("depth: full\nhypernetwork: {kind: core}\n")
    with pytest.raises(ConfigError, match=r"depth full takes hypernetwork\.kind memory"):
        load_settings(path)


def test_dialogues_are_rewritten_in_the_chat_format(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )

    def window(text: str, domain: str) -> Window:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Window(np.array(ids, np.int32), 3, domain, 1)

    made = [window("what is it\nAnswer: a fox", "quiz") for _ in range(4)]
    other = [window("what is it\nAnswer: a dog", "text"), window("no answer here", "quiz")]
    cutter = DialogueCutter(tokenizer, {"quiz": "\nAnswer: "}, share=0.5, size=40)
    rewritten = cutter.rewrite([*made, *other])
    texts = [tokenizer.decode(w.tokens.tolist()) for w in rewritten]
    assert [text.startswith("[user]") for text in texts] == [False, True, False, True, False, False]
    answer = tokenizer.decode(rewritten[1].targets.tolist())
    assert answer.strip() == "a fox"
    assert tokenizer.decode(rewritten[1].context_tokens.tolist()).startswith("[user] what is it")
