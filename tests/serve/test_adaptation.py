"""What the service computes is what the bundle says, checked against transformers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adapter_gen.apply import adapted
from adapter_gen.bundle import Bundle
from adapter_gen.generator import AdapterGenerator
from adapter_gen.hypernetwork import Generated
from lm_workers.models import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.serve

TEXT = "Preheat the oven to 180 degrees. Mix the flour, sugar and butter, then add two eggs."


def served(service, adaptation: object) -> list[float]:
    answer = service.openai().completions.create(
        model=service.model, prompt=TEXT, max_tokens=0, echo=True, logprobs=0,
        extra_body={"adaptation": adaptation},
    )  # fmt: skip
    return answer.choices[0].logprobs.token_logprobs[1:]


def expected(default_model: Path, bundle: Bundle, row: int | None) -> list[float]:
    """Log-probabilities of the text under the update of `row`, None for the base model."""
    model = load_causal_lm(default_model, torch.float32, "cpu")
    ids = torch.tensor([load_tokenizer(default_model)(TEXT).input_ids])
    if row is None:
        logits = model(ids).logits
    else:
        conditioning = bundle.snapshot.conditioning_of(row)
        delta = AdapterGenerator(bundle).generate(bundle.key(bundle.snapshot, row), conditioning)
        with adapted(model, bundle.spec, bundle.bases, Generated.of(delta)):
            logits = model(ids).logits
    logprobs = logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()


def test_served_log_probabilities_equal_the_reference(
    service, default_model: Path, bundle_path: Path
) -> None:
    bundle = Bundle.load(bundle_path, None)
    rows = {"off": None, int(bundle.snapshot.ids[0]): 0, int(bundle.snapshot.ids[3]): 3}
    found = {mode: served(service, mode) for mode in rows}
    for mode, row in rows.items():
        np.testing.assert_allclose(found[mode], expected(default_model, bundle, row), atol=2e-3)
    plain = np.array(found.pop("off"))
    assert all(np.abs(np.array(one) - plain).max() > 0.01 for one in found.values())
