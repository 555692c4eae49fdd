"""A few hundred bad inputs in each run of the tests; `bad_input.py` sends a hundred thousand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
from bad_input import from_schema, run
from fastapi import FastAPI
from reliability.asgi import Reply, fault
from reliability.inputs import Input, Inputs
from reliability.tiny import tiny_service

from lm_workers.worker import LMWorker

COUNT = 300
OF_SCHEMA = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FastAPI, LMWorker]]:
    with tiny_service(tmp_path_factory.mktemp("bad") / "tiny") as both:
        yield both


async def test_inputs_of_our_own(served: tuple[FastAPI, LMWorker]) -> None:
    found = await run(*served, islice(Inputs(seed=7), COUNT))
    assert found["faults"] == [] and found["inputs"] == COUNT
    kinds = {name.partition(":")[0] for name in found["statuses"]}
    assert len(kinds) == 9, kinds
    assert any(name.endswith(": 200") for name in found["statuses"])


async def test_inputs_against_the_schema(served: tuple[FastAPI, LMWorker]) -> None:
    found = await run(*served, from_schema(served[0], OF_SCHEMA, seed=7))
    assert found["faults"] == [] and found["inputs"] == OF_SCHEMA


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (0, b"", "no answer"),
        (500, b"{}", "status 500"),
        (404, b"not found", "without OpenAI's error body"),
        (400, b'{"error": {"message": "x"}}', "incomplete"),
        (200, b'data: {"error": {"code": "internal_error"}}', "internal error"),
        (200, b"{}", None),
    ],
)
def test_what_counts_as_a_fault(status: int, body: bytes, says: str | None) -> None:
    found = fault(Input("GET", "/"), Reply(status, body))
    assert found is None if says is None else says in str(found)
