"""Talk to a running service through Python handles, from any process on its Ray cluster.

serve run deploy/config.yaml          # in one terminal
python deploy/examples/handles.py     # in another
"""

from __future__ import annotations

import asyncio

from cluster_router.wire.types import Message, SamplingParams
from deploy.client import connect, connect_sync

QUESTION = (
    "I was charged twice for one transfer and the second payment has not been returned to my "
    "account. I have already waited three days for the refund. How do I get my money back?"
)


def blocking() -> None:
    """Whole answers and streams, without an event loop."""
    client = connect_sync()
    greedy = SamplingParams(max_tokens=24, temperature=0)
    assignment = client.assign(QUESTION)
    print(f"cluster {assignment.cluster}, similarity {assignment.similarity}")
    answer = client.generate([Message(role="user", content=QUESTION)], sampling=greedy)
    print(f"adapted by {answer.adaptation.adapter_key}: {answer.text}")
    for chunk in client.stream("SELECT name FROM", sampling=greedy, adaptation="off"):
        print(chunk.text, end="", flush=True)
    print()


async def concurrent() -> None:
    """Many requests at one time."""
    client = connect()
    prompts = [f"{number} + {number} =" for number in range(4)]
    sampling = SamplingParams(max_tokens=6, temperature=0)
    answers = await asyncio.gather(*(client.generate(one, sampling=sampling) for one in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        print(prompt, answer.text.strip().splitlines()[:1])


if __name__ == "__main__":
    blocking()
    asyncio.run(concurrent())
