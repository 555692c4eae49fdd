"""Bundles of untrained updates, for models of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import CoreConfig
from adapter_gen.sites import discover_sites
from cluster_router.wire.snapshot import ClusterSnapshot
from lm_workers.models import describe_model, load_causal_lm


def write_bundle(
    model: Path,
    target: Path,
    seed: int,
    clusters: int = 4,
    width: int = 8,
    depth: Literal["head", "full"] = "head",
) -> None:
    """A bundle for the model at `model`; `width` sets what generating one update costs."""
    info = describe_model(model, "untrained")
    spec = discover_sites(load_causal_lm(model, torch.float32, "cpu"), depth, rank=2)
    torch.manual_seed(seed)
    hypernetwork = CoreConfig(width=width).build(spec, info.hidden_size)
    centroids = _directions(clusters, info.hidden_size)
    Bundle(
        base_model="untrained",
        fingerprint=info.fingerprint,
        hypernetwork=hypernetwork,
        bases=init_bases(spec, seed),
        snapshot=ClusterSnapshot(
            version=1,
            ids=np.arange(clusters, dtype=np.int64),
            centroids=centroids,
            sizes=np.full(clusters, 100, np.int64),
            versions=np.ones(clusters, np.int64),
            conditioning=centroids,
            mean=np.zeros(info.hidden_size, np.float32),
            threshold=0.5,
        ),
        created_by="a test",
    ).save(target)


def _directions(count: int, dim: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """float32 [count, dim], of length 1; orthogonal where there is room."""
    if count <= dim:
        return np.eye(count, dim, dtype=np.float32)
    rows = np.random.default_rng(0).standard_normal((count, dim), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
