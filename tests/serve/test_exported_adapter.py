"""A cluster's adapter, downloaded and loaded in PEFT, answers as the service does."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel

from lm_workers.models import load_causal_lm, load_tokenizer

pytestmark = pytest.mark.serve

TEXT = "Your card will arrive within five days. If it does not, open the app and order a new one."


def test_peft_gives_the_served_log_probabilities(
    service, default_model: Path, tmp_path: Path
) -> None:
    cluster = httpx.get(f"{service.url}/v1/clusters").json()["data"][5]["id"]
    archive = httpx.get(f"{service.url}/v1/clusters/{cluster}/adapter", timeout=60).content
    zipfile.ZipFile(io.BytesIO(archive)).extractall(tmp_path)
    base = load_causal_lm(default_model, torch.float32, "cpu")
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([load_tokenizer(default_model)(TEXT).input_ids])

    def logprobs() -> list[float]:
        with torch.inference_mode():
            found = model(ids).logits[0, :-1].log_softmax(-1)
        return found.gather(1, ids[0, 1:, None])[:, 0].tolist()

    answer = service.openai().completions.create(
        model=service.model, prompt=TEXT, max_tokens=0, echo=True, logprobs=0,
        extra_body={"adaptation": cluster},
    )  # fmt: skip
    served = answer.choices[0].logprobs.token_logprobs[1:]
    np.testing.assert_allclose(served, logprobs(), atol=2e-3)
    with model.disable_adapter():
        assert np.abs(np.array(served) - logprobs()).max() > 0.01
