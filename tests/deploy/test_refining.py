"""What a router sends to the refinery, and what the refinery goes on from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from adapter_gen.codec import encode_delta
from adapter_gen.refinery import Offered
from adapter_gen.update import LoraDelta, Site, UpdateSpec
from cluster_router.outbox import Outbox
from cluster_router.refinements import RefinementStore
from cluster_router.wire.types import COMMON, AdapterKey, Assignment, Conditioning, Observation
from deploy.config import AppConfig
from deploy.refining import RouterRefining, _recall


def test_what_was_common_is_recalled_or_learned_anew_where_it_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, spec = RefinementStore(str(tmp_path)), UpdateSpec("head", 4, 8, (Site("head", 8, 8),))
    key, place = AdapterKey("base", "hyper", None, 0), ("a", COMMON)
    assert _recall(store, spec, key, place) is None
    assert not caplog.records
    cores = np.full((1, 4, 4), 0.5, np.float16)
    store.save(place, encode_delta(LoraDelta(key, cores=cores, shift=np.zeros(8, np.float16))))
    found = _recall(store, spec, key, place)
    assert found is not None and found.cores is not None
    assert np.array_equal(found.cores, cores)
    [file] = tmp_path.iterdir()
    file.write_bytes(b"torn")
    assert _recall(store, spec, key, place) is None
    assert "learned anew" in caplog.text


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
