"""The second engine's bench: what it asks for."""

from __future__ import annotations

import itertools

from second_engine import prompts


def test_no_prompt_begins_as_another_of_the_same_engine() -> None:
    texts, fresh = [tuple(range(500, 600)), tuple(range(700, 800))], itertools.count(100)
    runs = [prompts(texts, 3, fresh) for _ in ("a warm-up", "a repeat", "more clusters")]
    first = [prompt[0] for run in runs for prompt in run]
    assert len(set(first)) == len(first) == 9
    assert [prompt[1:] for prompt in runs[2]] == [prompt[1:] for prompt in runs[0]]
    assert {len(prompt) for run in runs for prompt in run} == {64}
