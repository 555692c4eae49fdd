"""Embedding, assignment and naming with the default model's tokenizer and token embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster_router.clusters import Assigner
from cluster_router.embedding import TokenEmbedder
from cluster_router.index import FaissIndex
from cluster_router.prompts import PromptEncoder
from cluster_router.vocabulary import CharacteristicTokens
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import GenerateRequest, Message
from lm_workers.models import load_embedding, load_tokenizer

KITCHEN = [
    "Melt the butter, stir in flour and milk, and season the sauce with salt and pepper.",
    "Chop the onion and garlic, fry them in olive oil, then add tomatoes and grated cheese.",
]
CODE = [
    "def load(self, path): with open(path) as file: return json.load(file) if path else None",
    "import os\n\nclass Config:\n    def __init__(self, name=None):\n        self.name = name",
]


@pytest.fixture(scope="module")
def embedding(default_model: Path) -> torch.Tensor:
    return load_embedding(default_model, torch.bfloat16)


@pytest.fixture(scope="module")
def encoder(default_model: Path, embedding: torch.Tensor) -> PromptEncoder:
    return PromptEncoder(load_tokenizer(default_model), 8192, len(embedding))


@pytest.fixture(scope="module")
def assigner(embedding: torch.Tensor, encoder: PromptEncoder) -> Assigner:
    """Cluster 0 is about cooking, cluster 1 is Python."""
    embedder = TokenEmbedder(embedding)
    points = [
        [embedder.embed(encoder.encode(GenerateRequest(prompt=text)).content_tokens) for text in t]
        for t in (KITCHEN, CODE)
    ]
    centroids = np.mean(points, axis=1)
    snapshot = ClusterSnapshot(
        version=1,
        ids=np.array([0, 1]),
        centroids=centroids / np.linalg.norm(centroids, axis=1, keepdims=True),
        sizes=np.array([2, 2]),
        versions=np.array([1, 1]),
        conditioning=np.zeros((2, 1), np.float32),
        mean=np.mean(points, axis=(0, 1)),
        threshold=0.5,
    )
    name = CharacteristicTokens(embedding, encoder.token_text)
    return Assigner(snapshot, FaissIndex, "base", "hyper", name)


@pytest.mark.parametrize(
    ("text", "cluster"),
    [
        ("How long should I bake the bread with cheese and salt?", 0),
        ("for name in self.names: print(name, file=None)", 1),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_and_chats_find_their_topic(
    embedding: torch.Tensor,
    encoder: PromptEncoder,
    assigner: Assigner,
    text: str,
    cluster: int,
    chat: bool,
) -> None:
    messages = (Message(role="user", content=text),)
    request = GenerateRequest(messages=messages) if chat else GenerateRequest(prompt=text)
    encoded = encoder.encode(request)
    assert ("<|im_start|>" in map(encoder.token_text, encoded.prompt_tokens)) == chat
    assert "".join(map(encoder.token_text, encoded.content_tokens)) == text
    assert (
        assigner.assign(TokenEmbedder(embedding).embed(encoded.content_tokens)).cluster == cluster
    )


def test_clusters_are_named_by_their_topic(assigner: Assigner) -> None:
    kitchen, code = ({*info.characteristic_tokens} for info in assigner.table()[1])
    assert kitchen & {"butter", "salt", "cheese", "garlic", "onion", "oil"}
    assert code & {"self", "import", "return", "json", "def", "None"}
