"""A random bundle of depth `full` for the tiny model, and settings that measure it in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.hypernetwork import CoreConfig
from cluster_router.embedding import TokenEmbedder
from training.artefact import Artefact
from training.base import FrozenBase
from training.clusters import embed_contexts, fit_snapshot
from training.config import ClusterSettings, TrainSettings
from training.evaluation.evaluator import Evaluator, Measured, Subject
from training.evaluation.groups import Group, GroupReader
from training.evaluation.settings import EvaluateSettings
from training.evaluation.store import Store


@pytest.fixture(scope="session")
def random_bundle(base: FrozenBase, settings: TrainSettings, groups: list[Group]) -> Bundle:
    """Updates of every linear, large enough to be felt."""
    spec = base.spec("full", 4)
    bases = init_bases(spec, 0)
    random = torch.Generator().manual_seed(0)
    s0 = 0.05 * torch.randn(bases.s0.shape, generator=random)
    embedder = TokenEmbedder(base.embedding)
    contexts = embed_contexts([w for g in groups for w in g.windows], embedder)
    snapshot = fit_snapshot(contexts, ClusterSettings(count=3, threshold_percentile=5), 0)
    torch.manual_seed(0)
    hypernetwork = CoreConfig(width=16, kappa=4).build(spec, snapshot.dim)
    torch.nn.init.normal_(hypernetwork.cores.weight, std=0.5)
    torch.nn.init.normal_(hypernetwork.shift.weight, std=0.5)
    return Bundle(
        base_model=settings.model,
        fingerprint=base.fingerprint,
        hypernetwork=hypernetwork,
        bases=dataclasses.replace(bases, s0=s0),
        snapshot=snapshot,
    )


@pytest.fixture(scope="session")
def quick_settings() -> EvaluateSettings:
    """Every variant on a few documents, one window in a pass."""
    return EvaluateSettings.model_validate(
        {
            "documents": 6,
            "expensive_documents": 2,
            "batch": 1,
            "resamples": 200,
            "context_prompt_tokens": 64,
            "refine": {"steps": 2, "learning_rate": 0.1, "batch": 4, "min_prompts": 2, "margin": 0},
            "oracle": {"steps": 4, "batch": 4, "evaluate_every": 2, "learning_rate": 0.01},
            "stream": {
                "groups": ["unseen"],
                "warmup_documents": 4,
                "publish_every": 4,
                "common": {
                    "every": 8,
                    "buffer": 16,
                    "refine": {
                        "steps": 8,
                        "passes": 1,
                        "learning_rate": 0.1,
                        "batch": 4,
                        "min_prompts": 2,
                        "margin": 0,
                    },
                },
                "refine_every": 4,
                "buffer": 8,
                "support_sizes": [0, 4, 8],
                "learner": {"min_size": 4, "window": 64},
            },
        }
    )


@pytest.fixture(scope="session")
def groups(
    base: FrozenBase,
    data: Path,
    settings: TrainSettings,
    quick_settings: EvaluateSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Group]:
    """One seen domain, two unseen ones that arrive as a stream. Read only."""
    cache = tmp_path_factory.mktemp("inventories")
    reader = GroupReader.open(data, base, ["animals"], settings.data, quick_settings, cache)
    return reader.groups()


@pytest.fixture(scope="session")
def random_artefact(random_bundle: Bundle, settings: TrainSettings) -> Artefact:
    """The bundle as a training run on `animals` would leave it."""
    record = {
        "train_documents": 1,
        "train_tokens": 1,
        "static": {"best_step": 1},
        "prototypes": [{"scale": 1.0}],
        "blends": [{"sharpness": 16.0, "strength": 1.0, "loss": 2.0}],
        "domains": {"animals": 1},
        "licences": {},
    }
    data = settings.data.model_copy(update={"near_duplicates": "keep"})
    return Artefact(random_bundle, settings.model_copy(update={"data": data}), record)


@pytest.fixture(scope="session")
def measure(base: FrozenBase, random_bundle: Bundle) -> Callable[..., dict[str, Measured]]:
    """Measure groups of documents with an empty store, or with one that is there."""

    def run(groups: list[Group], settings: EvaluateSettings, folder: Path) -> dict[str, Measured]:
        evaluator = Evaluator(base, Subject(random_bundle), settings, Store(folder))
        return {found.name: found for found in evaluator.measure(groups)}

    return run
