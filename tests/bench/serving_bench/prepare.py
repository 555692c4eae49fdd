"""What the engines serve: a model folder, a bundle with random updates, random LoRA adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import CoreConfig, Hypernetwork
from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth
from cluster_router.wire.snapshot import ClusterSnapshot
from lm_workers.models import describe_model, load_causal_lm
from lm_workers.models.config import is_family, load_config
from lm_workers.models.logits import KeptLogits

LORA_TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_RANK = 8
LORA_STRENGTH = 0.05
CONDITIONING = 64
STRENGTH = 0.5  # standard deviation of generated numbers: answers change, and stay finite


def meta_model(path: Path) -> PreTrainedModel:
    """The model's layers without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return model


def start_once(model: Path, dtype: torch.dtype, device: str) -> None:
    """What only the first start of a model on a machine does: later ones take less memory."""
    config = load_config(model)
    if is_family(config):
        kept = KeptLogits(describe_model(model, model.name).fingerprint, config, dtype, device)
        kept.get(lambda: load_causal_lm(model, dtype, device))


def write_bundle(model: Path, target: Path, depth: Depth, rank: int, clusters: int) -> None:
    """A bundle whose hypernetwork gives every one of `clusters` clusters another random update.

    An untrained update costs what a trained one does. The centroids are random, so requests name
    their cluster.
    """
    info = describe_model(model, model.name)
    spec = discover_sites(meta_model(model), depth, rank)
    torch.manual_seed(0)
    hypernetwork = CoreConfig().build(spec, CONDITIONING)
    _scale(hypernetwork)
    Bundle(
        base_model=model.name,
        fingerprint=info.fingerprint,
        hypernetwork=hypernetwork.eval(),
        bases=init_bases(spec, seed=0),
        snapshot=_snapshot(clusters, info.hidden_size),
        created_by="tests/bench/serving.py: random updates, of no use but for measuring speed",
    ).save(target)


@torch.no_grad()
def _scale(hypernetwork: Hypernetwork) -> None:
    """Leave step 0, at which every update is zero."""
    for layer in (hypernetwork.cores, hypernetwork.shift):
        assert isinstance(layer, torch.nn.Linear)
        layer.weight.normal_(std=STRENGTH)


def _snapshot(clusters: int, dim: int) -> ClusterSnapshot:
    random = np.random.default_rng(0)
    centroids = random.normal(size=(clusters, dim)).astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return ClusterSnapshot(
        version=1,
        ids=np.arange(clusters, dtype=np.int64),
        centroids=centroids,
        sizes=np.full(clusters, 1000, np.int64),
        versions=np.ones(clusters, np.int64),
        conditioning=random.normal(size=(clusters, CONDITIONING)).astype(np.float32),
        mean=np.zeros(dim, np.float32),
        threshold=0.0,
    )


def write_loras(model: Path, target: Path, count: int) -> None:
    """`count` folders 0000, 0001, ... with random adapters in PEFT's format."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS)
    adapted = get_peft_model(base, config)
    torch.manual_seed(0)
    for number in range(count):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=LORA_STRENGTH)
        folder = target / f"{number:04}"
        adapted.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
