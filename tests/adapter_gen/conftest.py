"""Small real parts: specs, hypernetworks that have left step 0, bundles, random models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import CoreConfig, Hypernetwork, PaperConfig
from adapter_gen.sites import discover_sites
from adapter_gen.update import HEAD, Depth, LoraDelta, SharedBases, Site, UpdateSpec
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import AdapterKey

DIM = 12
SPECS = {
    "head": UpdateSpec("head", 3, DIM, (Site(HEAD, DIM, DIM),)),
    "full": UpdateSpec(
        "full",
        3,
        DIM,
        (
            Site("model.layers.0.mlp.up_proj", DIM, 20),
            Site("model.layers.0.mlp.down_proj", 20, DIM),
            Site(HEAD, DIM, DIM),
        ),
    ),
    "paper": UpdateSpec("paper", 3, DIM, (Site("lm_head", DIM, 30),), alpha=6.0),
}


@pytest.fixture(params=["head", "full", "paper"])
def depth(request: pytest.FixtureRequest) -> Depth:
    return request.param


@pytest.fixture
def spec(depth: Depth) -> UpdateSpec:
    return SPECS[depth]


def trained(spec: UpdateSpec, conditioning_dim: int = DIM) -> Hypernetwork:
    """A hypernetwork with no weight left at zero, so that its updates differ by cluster."""
    config = PaperConfig() if spec.depth == "paper" else CoreConfig(width=16)
    torch.manual_seed(0)
    module = config.build(spec, conditioning_dim)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any() or spec.depth == "paper":
                parameter.normal_(std=0.3)
    return module


def random_bases(spec: UpdateSpec) -> SharedBases:
    bases = init_bases(spec, seed=0)
    return SharedBases(
        u=bases.u,
        v=bases.v,
        s0=0.3 * torch.randn_like(bases.s0),
        shift=0.3 * torch.randn_like(bases.shift),
    )


def snapshot_of(clusters: int, dim: int = DIM, seed: int = 0) -> ClusterSnapshot:
    random = np.random.default_rng(seed)
    centroids = random.normal(size=(clusters, dim)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return ClusterSnapshot(
        version=7,
        ids=np.arange(clusters, dtype=np.int64) + 10,
        centroids=centroids,
        sizes=np.arange(1, clusters + 1, dtype=np.int64),
        versions=np.full(clusters, 5, np.int64),
        conditioning=centroids,
        mean=centroids.mean(0),
        threshold=0.25,
    )


@pytest.fixture
def make_bundle() -> Callable[..., Bundle]:
    def make(depth: Depth = "full", **changes: object) -> Bundle:
        spec = SPECS[depth]
        parts: dict[str, object] = {
            "base_model": "test/base",
            "fingerprint": "f" * 16,
            "hypernetwork": trained(spec),
            "bases": random_bases(spec),
            "snapshot": snapshot_of(4),
            "token_weights": np.linspace(0, 1, 30, dtype=np.float32),
            "evaluation": {"net_gain": 0.01},
            "created_by": "a test",
            "seed": 3,
        }
        return Bundle(**{**parts, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_hypernetwork() -> Callable[..., Hypernetwork]:
    return trained


@pytest.fixture
def make_bases() -> Callable[[UpdateSpec], SharedBases]:
    return random_bases


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    configs = {
        "llama": LlamaConfig(**sizes, tie_word_embeddings=True),
        "qwen2": Qwen2Config(**sizes, tie_word_embeddings=False),
        "gpt2": GPT2Config(
            n_embd=16, n_layer=2, n_head=4, vocab_size=40, bos_token_id=0, eos_token_id=0
        ),
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[request.param]).eval()


@pytest.fixture
def parts(model: PreTrainedModel, depth: Depth) -> tuple[UpdateSpec, SharedBases, LoraDelta]:
    """An update of `model` at each depth, with all that it takes to apply it."""
    spec = discover_sites(model, depth, rank=3, alpha=6.0)
    module = trained(spec, 8)
    key = AdapterKey("base", "hyper", 4, 2)
    delta = module(torch.randn(1, 8), torch.tensor([40.0])).delta(0, key, spec)
    return spec, random_bases(spec), delta
