"""Decoding steps that are played from a tape."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import normal
from traffic_cases import CONFIG, answers, mixed, prompts, request, update_of

from lm_workers.build import build_engine
from lm_workers.engine import Engine
from lm_workers.layers.body import StackBody
from lm_workers.layers.native import NativeKernels
from lm_workers.layers.stack import DecoderStack
from lm_workers.layers.tape import Memory, Tape

NATIVE = CONFIG.model_copy(update={"kernels": "native", "linear": "packed"})


def stack_of(engine: Engine) -> DecoderStack:
    [found] = [one for one in engine._runner._body.modules() if isinstance(one, DecoderStack)]
    return found


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Every tape that is played, each time."""
    found: list[Tape] = []
    play = Tape.play

    def noting(tape: Tape) -> None:
        found.append(tape)
        play(tape)

    monkeypatch.setattr(Tape, "play", noting)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_played_steps_give_the_tokens_of_computed_ones(
    cxx: str, tiny_checkpoints: dict[str, Path], family: str, played: list[Tape]
) -> None:
    spec, bases, deltas = update_of(tiny_checkpoints[family])
    engine = build_engine(tiny_checkpoints[family], NATIVE, (spec, bases))
    asked = mixed(deltas)
    asked += [(request(prompts(1)[0], max_tokens=90, ignore_eos=True), deltas[1])]
    found = answers(engine, asked)
    assert len(played) > 40 and len(set(played)) >= 5, "of many shapes, again and again"
    stack_of(engine)._taped = False
    count = len(played)
    again = [(request(one.prompt_tokens, **one.sampling.model_dump()), d) for one, d in asked]
    assert answers(engine, again) == found
    assert len(played) == count
    assert answers(engine, mixed([None])) != found


@pytest.mark.parametrize(("family", "stacked"), [("llama", True), ("qwen3", True), ("gpt2", False)])
def test_a_model_of_the_family_goes_past_transformers(
    tiny_checkpoints: dict[str, Path], family: str, stacked: bool
) -> None:
    engine = build_engine(tiny_checkpoints[family], CONFIG)
    assert isinstance(engine._runner._body, StackBody) == stacked


def test_large_steps_are_computed(
    cxx: str, tiny_llama: Path, played: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_workers.layers.stack._MOST_ROWS", 1)
    engine = build_engine(tiny_llama, NATIVE)
    asked = [request(range(2, 22), max_tokens=9, ignore_eos=True) for _ in range(3)]
    found = answers(engine, [(one, None) for one in asked])
    assert not played
    assert found[0] == found[1] == found[2]
    large = stack_of(engine)._large
    assert (large.rows, len(large)) == (60, 8), "the largest step's, for all layers and steps"


def test_the_tapes_of_shapes_not_seen_for_long_are_dropped(
    cxx: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_workers.layers.stack._MOST_TAPES", 2)
    engine = build_engine(tiny_llama, NATIVE)
    for rows in (1, 2, 1, 3):
        one = [request([5 + row], max_tokens=3, ignore_eos=True) for row in range(rows)]
        answers(engine, [(asked, None) for asked in one])
    assert [shape.rows for shape in stack_of(engine)._steps] == [1, 3]


def test_layers_share_the_memory_of_their_results(cxx: str, tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, NATIVE)
    answers(engine, [(request(prompts(1)[0]), None)])
    assert len(stack_of(engine)._steps) > 2
    # Norm, queries with keys and values, attention, output, norm, gate and up, their product, down.
    assert len(stack_of(engine)._memory) == 8


def test_a_step_that_fails_while_it_is_noted_leaves_nothing_behind(
    cxx: str, tiny_llama: Path, played: list[Tape]
) -> None:
    spec, bases, deltas = update_of(tiny_llama)
    engine = build_engine(tiny_llama, NATIVE, (spec, bases))
    stack = stack_of(engine)
    last, slots = stack.layers[-1], []

    def fail(*args: Any, **kwargs: Any) -> None:
        slots.append(stack._rows.tokens)
        raise RuntimeError("no memory")

    forward, last.forward = last.forward, fail
    engine.add(request(prompts(1)[0][:1], max_tokens=3), deltas[1])
    with pytest.raises(RuntimeError, match="no memory"):
        while engine.has_work:
            engine.step()
    last.forward = forward
    assert not any(shape.adapted for shape in stack._steps)
    assert stack._rows.tokens is not slots[0]


def test_a_tape_notes_the_calls_of_its_own_thread_alone(cxx: str) -> None:
    kernels, weight = NativeKernels(torch.float32, threads=1), torch.ones(8)
    mine, other = (normal(2, 8, dtype=torch.float32, seed=seed) for seed in (1, 2))
    tape = Tape(Memory(2))
    with tape.recording():
        beside = threading.Thread(target=kernels.rms_norm, args=(other, weight, 1e-5))
        beside.start()
        beside.join()
        found = kernels.rms_norm(mine, weight, 1e-5)
    kernels.rms_norm(mine, weight, 1e-5)
    assert tape._calls == 1
    first = found.clone()
    mine *= torch.arange(8)
    tape.play()
    assert torch.equal(found, kernels.rms_norm(mine, weight, 1e-5))
    assert not torch.equal(found, first)
