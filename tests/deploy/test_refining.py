"""What a router sends to the refinery."""

from __future__ import annotations

import asyncio

import numpy as np

from adapter_gen.refinery import Offered
from cluster_router.outbox import Outbox
from cluster_router.wire.types import AdapterKey, Assignment, Conditioning, Observation
from deploy.config import AppConfig
from deploy.refining import RouterRefining


async def test_a_prompt_with_an_earlier_answer_does_not_reach_the_refinery() -> None:
    sent: list[Offered] = []
    arrived = asyncio.Event()

    async def send(offered: list[Offered]) -> None:
        sent.extend(offered)
        arrived.set()

    config = AppConfig.model_validate({"refinement": {"namespaces": ["*"]}})
    refining = RouterRefining(config, None, None, lead=())
    refining.outbox = Outbox(send, "refinery", interval_s=0.01)
    embedding = np.ones(4, np.float32) / 2
    key, conditioning = AdapterKey("base", "hyper", 7, 1), Conditioning(embedding, 5.0)
    chosen = Assignment(key, 7, 0.8, 1, conditioning)
    for token, answered in ((1, True), (2, False)):
        refining.observe(Observation("a", embedding, (token,) * 20, chosen, answered))
    task = asyncio.create_task(refining.outbox.run())
    async with asyncio.timeout(10):
        await arrived.wait()
    task.cancel()
    assert [int(one.tokens[0]) for one in sent] == [2]
