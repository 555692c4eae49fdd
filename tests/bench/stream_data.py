"""A replayable stream of prompts from many domains, as embeddings."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster_router.embedding import TokenEmbedder
from lm_workers.models import DEFAULT_MODEL, load_embedding, load_tokenizer, resolve_model
from lm_workers.models.source import default_cache
from training.clusters import embed_contexts, idf_weights
from training.config import DataSettings
from training.data import SPLITS, WindowCutter, open_reader, read_documents

CONTEXT = 128  # tokens of a document that are taken for a prompt
START_DOCUMENTS = 64  # documents of each domain that only the starting clusters see
STREAM_DOCUMENTS = 1400
FORMAT = 1

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Documents:
    """Embedded prompts float32 [N, d], their domains [N], and whether the stream may send them."""

    embeddings: Floats
    domains: NDArray[np.str_]
    streamed: NDArray[np.bool_]


def load_documents(folder: Path, weights: str) -> Documents:
    """Embed the data folder with the default model's token embeddings, or read the cached result.

    With `weights="idf"` tokens count by inverse document frequency in the starting documents.
    """
    stamp = hashlib.sha256((folder / "MANIFEST.json").read_bytes()).hexdigest()[:12]
    name = f"stream-{weights}-{CONTEXT}-{STREAM_DOCUMENTS}-{stamp}-v{FORMAT}.npz"
    path = default_cache() / "bench" / name
    if not path.exists():
        documents = _embed(folder, weights)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **vars(documents))
    with np.load(path) as arrays:
        return Documents(**{key: arrays[key] for key in arrays.files})


def _embed(folder: Path, weights: str) -> Documents:
    model = resolve_model(DEFAULT_MODEL)
    # Twice the context, since a document gives half of its tokens where it is short.
    cutter = WindowCutter(load_tokenizer(model), CONTEXT, CONTEXT)
    windows, domains, streamed = [], [], []
    reader = open_reader(folder, DataSettings(), default_cache() / "bench")
    for domain in reader.domains():
        documents = [d for s in SPLITS for d in read_documents(reader, domain, s, 10**6)]
        for place, document in enumerate(documents[: START_DOCUMENTS + STREAM_DOCUMENTS]):
            if (window := cutter.cut(document)) is not None:
                windows.append(window)
                domains.append(domain)
                streamed.append(place >= START_DOCUMENTS)
    embedding = load_embedding(model)
    token_weights = None
    if weights == "idf":
        start = [w for w, later in zip(windows, streamed, strict=True) if not later]
        token_weights = idf_weights(start, embedding)
    rows = embed_contexts(windows, TokenEmbedder(embedding, token_weights))
    return Documents(rows, np.array(domains), np.array(streamed))


@dataclass(frozen=True)
class Plan:
    """What happens when, as fractions of the stream.

    The mixture of domains drifts from one to another until `drift_until`. Bursts, in which one
    domain makes up most of the traffic for 150 requests, come until `steady_from`. The novel domain
    has a share of `novel_share` between the two moments of `novel`, and is absent otherwise.
    """

    requests: int
    novel_domain: str
    seed: int
    drift_until: float = 0.4
    novel: tuple[float, float] = (0.4, 0.55)
    novel_share: float = 0.15
    steady_from: float = 0.7
    bursts: int = 6


def make_stream(documents: Documents, plan: Plan) -> NDArray[np.int64]:
    """Rows of `documents` in the order in which they are sent. A domain's documents come round."""
    random = np.random.default_rng(plan.seed)
    pools = {
        domain: random.permutation(
            np.flatnonzero((documents.domains == domain) & documents.streamed)
        )
        for domain in np.unique(documents.domains).tolist()
    }
    names = [name for name in pools if name != plan.novel_domain]
    mixes = random.dirichlet(np.full(len(names), 4.0), size=2)
    bursts = random.uniform(0, plan.steady_from, plan.bursts)
    loud = random.choice(names, plan.bursts).tolist()
    used = dict.fromkeys(pools, 0)
    rows = np.empty(plan.requests, np.int64)
    for place in range(plan.requests):
        now = place / plan.requests
        weight = min(1.0, now / plan.drift_until)
        domain = str(random.choice(names, p=(1 - weight) * mixes[0] + weight * mixes[1]))
        for start, name in zip(bursts, loud, strict=True):
            if start <= now < start + 150 / plan.requests and random.random() < 0.8:
                domain = name
        if plan.novel[0] <= now < plan.novel[1] and random.random() < plan.novel_share:
            domain = plan.novel_domain
        rows[place] = pools[domain][used[domain] % len(pools[domain])]
        used[domain] += 1
    return rows
