"""The whole service but for Ray, in this process, around a model of two layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from fastapi import FastAPI
from reliability.inputs import MODEL
from serving_bench.random_models import write_random_model

from cluster_router.clusters import Assigner
from cluster_router.delivery import Delivery
from cluster_router.embedding import TokenEmbedder
from cluster_router.http import build_app
from cluster_router.index import FaissIndex
from cluster_router.prompts import PromptEncoder
from cluster_router.router import ClusterRouter, ServedModel
from cluster_router.tenants import TenantAssigners
from cluster_router.wire.errors import UnavailableError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import AdapterKey, Conditioning
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import load_embedding, load_tokenizer
from lm_workers.worker import LMWorker

CONTEXT = 64


class NoAdapters:
    """Satisfies Exporter and AdapterSource where there is no bundle."""

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> object:
        raise UnavailableError("this service runs without a bundle")

    async def export(self, key: AdapterKey, conditioning: Conditioning | None) -> bytes:
        raise UnavailableError("this service runs without a bundle")


@contextmanager
def tiny_service(folder: Path) -> Iterator[tuple[FastAPI, LMWorker]]:
    """The application and its engine's worker. `folder` gets the model."""
    path = write_random_model("tiny", folder, torch.float32, "cpu")
    config = EngineConfig(dtype="float32", max_context=CONTEXT, cpu_threads=1, kernels="reference")
    worker = LMWorker(build_engine(path, config), NoAdapters())
    tokenizer, embedding = load_tokenizer(path), load_embedding(path)
    vocabulary = embedding.shape[0]
    snapshot = ClusterSnapshot.empty(embedding.shape[1])
    router = ClusterRouter(
        ServedModel(MODEL, 1_700_000_000, CONTEXT, vocabulary),
        PromptEncoder(tokenizer, CONTEXT, vocabulary),
        TokenEmbedder(np.asarray(embedding)),
        TenantAssigners(lambda _: Assigner(snapshot, FaissIndex, "tiny", None)),
        Delivery(worker),
        NoAdapters(),
    )

    async def ready() -> str | None:
        return None if worker.alive else "the engine's thread has ended"

    try:
        yield build_app(lambda: router, ready), worker
    finally:
        worker.close()
