"""The two protocols: what each cuts out of a text, and what each loss says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from cluster_router.wire.errors import ConfigError
from training.base import FrozenBase
from training.data import Window
from training.features import Encoder, FeatureCache
from training.paper.examples import (
    UNSCORED,
    Examples,
    clustered_batches,
    embed_padded,
    honest_examples,
    published_examples,
)
from training.paper.models import parameter_counts
from training.paper.prepare import Preparation
from training.paper.scoring import Variant, mean_of_batches, mean_of_tokens, token_losses
from training.paper.settings import PUBLISHED_PARAMETERS, PaperSettings
from training.paper.states import StateCache, draw_positions
from training.paper.text import Sources, honest_windows, published_sequences, read_text

VOCAB, LENGTH, PADDING = 24, 16, 23
HEAD = torch.eye(VOCAB)
EMBEDDING = torch.eye(VOCAB)


def copies(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A model that is sure the token it has just read comes again."""
    return 30.0 * one_hot(tokens, VOCAB).float()


def foresees(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A model that knows the texts below, which count upwards; after padding comes token 1."""
    following = torch.where(tokens == PADDING, 1, (tokens + 1) % (PADDING - 1))
    return 30.0 * one_hot(following, VOCAB).float()


def knows_nothing(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*tokens.shape, VOCAB)


def lines(*lengths: int) -> torch.Tensor:
    """Padded lines that count upwards from 1 and never hold a token twice in a row."""
    sequences = torch.full((len(lengths), LENGTH), PADDING)
    for row, length in enumerate(lengths):
        sequences[row, :length] = torch.arange(1, length + 1)
    return sequences


def published_losses(encode: Encoder, sequences: torch.Tensor, folder: Path) -> tuple[float, float]:
    """Of the unadapted model, at the last position and at every other."""
    positions = draw_positions(len(sequences), LENGTH, LENGTH)
    states = StateCache(folder, encode.__name__, encode, batch=2, shard=3).states(
        sequences, positions, "states"
    )
    last, every = published_examples(sequences, positions, states, EMBEDDING)
    return batch_mean(last), batch_mean(every)


def batch_mean(examples: Examples) -> float:
    batched = examples.batched(2, 5, seed=0)
    return mean_of_batches(base_losses(batched), batched)


def base_losses(examples: Examples) -> np.ndarray:
    return token_losses({"base": Variant()}, examples, HEAD, 1.0)["base"]


def honest_loss(encode: Encoder, count: int, folder: Path) -> float:
    windows = [
        Window(np.arange(i, i + LENGTH, dtype=np.int32) % (PADDING - 1), 4, "text", 1)
        for i in range(count)
    ]
    features = FeatureCache(folder, encode.__name__, encode).features(windows)
    examples = honest_examples(features, EMBEDDING).batched(2, 5, seed=0)
    return mean_of_tokens(base_losses(examples), examples)


def test_a_model_that_copies_the_current_token_wins_the_published_loss_only(tmp_path: Path) -> None:
    """Why the published table cannot be read as language modelling."""
    text = lines(5, 16, 9, 3, 16)
    assert published_losses(copies, text, tmp_path)[0] < 1e-3
    assert honest_loss(copies, 6, tmp_path) > 25
    assert published_losses(foresees, text, tmp_path)[0] > 25
    assert honest_loss(foresees, 6, tmp_path) < 1e-3


def test_a_uniform_model_loses_the_log_of_the_vocabulary_everywhere(tmp_path: Path) -> None:
    losses = (
        *published_losses(knows_nothing, lines(5, 16, 9), tmp_path),
        honest_loss(knows_nothing, 6, tmp_path),
    )
    assert losses == pytest.approx([math.log(VOCAB)] * 3)


def test_the_loss_over_every_position_scores_padding(tmp_path: Path) -> None:
    """A model of the text alone is wrong at every padded position: 15 of 16 have a next token."""
    _, every = published_losses(foresees, lines(6), tmp_path)
    assert every == pytest.approx(30 * (15 - 5) / 15, rel=1e-3)


def test_token_zero_is_left_out_and_padding_is_not(tmp_path: Path) -> None:
    text = lines(5, 16)
    text[1, -1] = 0
    positions = draw_positions(2, LENGTH, 3)
    states = torch.zeros(2, 4, VOCAB, dtype=torch.bfloat16)
    last, every = published_examples(text, positions, states, EMBEDDING)
    assert last.targets.tolist() == [[PADDING], [UNSCORED]]
    assert every.targets.shape == (2, 3)
    assert all(
        every.targets[row, column] == text[row, positions[row, column] + 1]
        for row in range(2)
        for column in range(3)
    )


def test_what_is_not_scored_changes_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, VOCAB, generator=random)
    targets = torch.randint(VOCAB, (4, 5), generator=random)
    embeddings = embed_padded(targets, EMBEDDING)
    padded = Examples(
        torch.cat([hidden, torch.full((4, 3, VOCAB), 9.0)], dim=1),
        torch.cat([targets, torch.full((4, 3), UNSCORED)], dim=1),
        embeddings,
    ).batched(2, 5, seed=0)
    plain = Examples(hidden, targets, embeddings).batched(2, 5, seed=0)
    for mean in (mean_of_tokens, mean_of_batches):
        assert mean(base_losses(padded), padded) == mean(base_losses(plain), plain)
    assert np.isnan(base_losses(padded)[:, 5:]).all()


def test_the_published_embedding_sees_padding_and_the_honest_one_the_context_only(
    tmp_path: Path,
) -> None:
    short, long = embed_padded(lines(2, 16), EMBEDDING)
    assert short[PADDING] > 0.9 and long[PADDING] == 0
    windows = [
        Window(np.array([1, 2, 3, after], np.int32), 2, "text", 1) for after in (4, 5) for _ in "ab"
    ]
    features = FeatureCache(tmp_path, "c", copies).features(windows)
    embeddings = honest_examples(features, EMBEDDING).embeddings
    assert torch.equal(embeddings, embeddings[:1].expand(4, -1))


def test_batches_hold_like_texts_and_each_text_once() -> None:
    embeddings = torch.eye(3).repeat_interleave(torch.tensor([40, 7, 25]), dim=0)
    embeddings += 0.01 * torch.randn(72, 3, generator=torch.Generator().manual_seed(0))
    batches = clustered_batches(embeddings, 16, 10, seed=0)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(72))
    assert max(len(batch) for batch in batches) == 16
    kinds = [{int(embeddings[row].argmax()) for row in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    again = clustered_batches(embeddings, 16, 10, seed=0)
    assert [b.tolist() for b in again] == [b.tolist() for b in batches]


def test_states_are_computed_once_and_at_the_named_positions(tmp_path: Path) -> None:
    calls = []

    def encode(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        calls.append(mask)
        return torch.stack([tokens, torch.arange(LENGTH).expand_as(tokens)], dim=-1).float()

    text = lines(3, 16, 5)
    text[0, 0] = 0
    positions = draw_positions(3, LENGTH, 4)
    cache = StateCache(tmp_path, "base", encode, batch=2, shard=2)
    states = cache.states(text, positions, "first")
    assert torch.equal(states[..., 1].long(), positions)
    assert torch.equal(states[..., 0].long(), text.gather(1, positions))
    assert len(calls) == 2
    assert torch.equal(calls[0], (text[:2] != 0).long()), "padding is attended to, token 0 is not"
    assert torch.equal(cache.states(text, positions, "again"), states)
    assert len(calls) == 2


def test_positions_are_distinct_and_end_with_the_last() -> None:
    positions = draw_positions(50, LENGTH, 6)
    assert positions.shape == (50, 7)
    assert (positions[:, -1] == LENGTH - 1).all()
    assert all(len(set(row)) == 7 for row in positions.tolist())
    assert draw_positions(2, LENGTH, 99).shape == (2, LENGTH)


def test_samples_are_lines_padded_on_the_right(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The quick brown fox\n \n\n = Paris = \n" + "lazy dog " * 40
    sequences = published_sequences(tiny_tokenizer, text, 20)
    end = tiny_tokenizer.eos_token_id
    assert sequences.shape == (3, 20)
    assert sequences[0, -1] == end and sequences[1, -1] == end and sequences[2, -1] != end
    shown = tiny_tokenizer.decode(sequences[1][sequences[1] != end])
    assert shown == " = Paris = \n"
    some = published_sequences(tiny_tokenizer, "\n".join("abcdefghij"), 4, limit=4)
    assert some[:, 0].tolist() == [tiny_tokenizer(c)["input_ids"][0] for c in "adgj"]


def test_honest_windows_share_no_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(f"{n} " for n in range(400))
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = honest_windows(tiny_tokenizer, text, 32, 12)
    assert np.concatenate([w.tokens for w in windows]).tolist() == ids[: len(ids) // 32 * 32]
    assert all((len(w.context_tokens), w.scored) == (12, 20) for w in windows)
    few = honest_windows(tiny_tokenizer, text, 32, 12, limit=3)
    assert [few[i].tokens.tolist() for i in (0, 2)] == [windows[i].tokens.tolist() for i in (0, -1)]
    with pytest.raises(ConfigError, match="longer text"):
        honest_windows(tiny_tokenizer, "too short", 32, 12)


def _folder(root: Path, names: Sequence[str]) -> Path:
    (root / "wikitext-2").mkdir(parents=True)
    for name in names:
        (root / name).write_text("text")
    return root


def test_wikitext_is_trained_on_where_it_is_there(tmp_path: Path) -> None:
    full = _folder(tmp_path / "a", ["wikitext-2/train.txt", "wikitext-2/valid.txt"])
    found = Sources.in_folder(full)
    assert (found.train.name, found.test, found.trains_on_wikitext) == ("train.txt", None, True)
    names = ["wikipedia.train.jsonl.gz", "wikitext-2/valid.txt", "wikitext-2/test.raw.txt"]
    found = Sources.in_folder(_folder(tmp_path / "b", names))
    assert found.train.name == "wikipedia.train.jsonl.gz" and not found.trains_on_wikitext
    assert found.test is not None and found.test.name == "test.raw.txt"
    with pytest.raises(ConfigError, match="--validation"):
        Sources.in_folder(_folder(tmp_path / "c", ["wikitext-2/train.txt"]))


def test_text_is_read_from_files_folders_and_domains(data: Path, tmp_path: Path) -> None:
    one = read_text(data / "animals.train.jsonl.gz")
    assert one.count("\n\n") == 23 and "fox" in one
    assert len(read_text(data)) > 2 * len(one), "a folder's training files, all of them"
    (tmp_path / "empty.txt").write_text(" \n")
    for name in ("empty.txt", "missing.txt", "odd.jsonl.gz"):
        with pytest.raises(ConfigError, match=name):
            read_text(tmp_path / name)


def test_gpt2_small_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GPT2Config())
    assert parameter_counts(model, PaperSettings(model="gpt2")) == PUBLISHED_PARAMETERS
    assert list(PUBLISHED_PARAMETERS.values()) == [124_439_808, 204_100, 6_786_596]


def test_a_model_that_pads_with_token_zero_needs_lines_that_fill_all_positions(
    tiny_checkpoints: dict[str, Path], edit_config: Callable[..., Path], tmp_path: Path
) -> None:
    folder = edit_config(tiny_checkpoints["llama"], tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<s>"}))
    (tmp_path / "text.txt").write_text("short\n" * 4)
    sources = Sources(tmp_path / "text.txt", tmp_path / "text.txt")
    base = FrozenBase(folder)
    assert base.tokenizer.pad_token_id == 0
    preparation = Preparation(PaperSettings(model="", length=16), sources, base, tmp_path)
    with pytest.raises(ConfigError, match="token 0"):
        preparation.published()
