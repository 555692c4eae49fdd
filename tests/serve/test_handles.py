"""Python handles, from the driver and from another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster_router.wire.errors import ContextLengthError, UnavailableError, UnknownClusterError
from cluster_router.wire.types import Message, SamplingParams
from deploy.client import connect, connect_sync

pytestmark = pytest.mark.serve

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


async def test_async_client(service) -> None:
    client = connect()
    question = [Message(role="user", content="What is the capital of France?")]
    whole = await client.generate(question, sampling=GREEDY)
    chunks = [c async for c in client.stream(question, sampling=GREEDY)]
    assert "Paris" in whole.text == "".join(chunk.text for chunk in chunks)
    assert chunks[-1].finish_reason == whole.finish_reason
    assignment = await client.assign(question)
    assert assignment.cluster == whole.adaptation.cluster
    assert len(await client.clusters()) > 8


async def test_a_stream_that_is_closed_frees_its_place(service) -> None:
    before = await service.generated_once_idle()
    sampling = SamplingParams(max_tokens=1500, ignore_eos=True)
    streams = [connect().stream(f"Once upon a time {i}", sampling=sampling) for i in range(4)]
    for stream in streams:
        await anext(stream)
        await stream.aclose()
    generated = await service.generated_once_idle() - before
    assert 4 <= generated < 1500, "not one should have run to its end"


def test_sync_client_equals_http(service) -> None:
    client = connect_sync()
    messages = [Message(role="user", content="What is the capital of France?")]
    whole = client.generate(messages, sampling=GREEDY)
    assert "".join(c.text for c in client.stream(messages, sampling=GREEDY)) == whole.text
    answer = service.openai().chat.completions.create(
        model=service.model,
        messages=[{"role": "user", "content": messages[0].content}],
        temperature=0,
        max_tokens=8,
    )
    assert answer.choices[0].message.content == whole.text
    assert answer.adaptation["adapter_key"] == whole.adaptation.adapter_key


async def test_errors_arrive_as_our_own(service) -> None:
    with pytest.raises(ContextLengthError, match="2048"):
        await connect().generate("word " * 3000)
    with pytest.raises(UnknownClusterError):
        async for _ in connect().stream("x", adaptation=12345):
            pass
    with pytest.raises(UnavailableError, match="no application 'other'"):
        connect("other")


def test_the_example_runs_in_another_process(service) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "deploy/examples/handles.py")],
        env={**os.environ, "RAY_ADDRESS": service.ray_address},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "adapted by" in run.stdout
    assert "2 + 2 =" in run.stdout
