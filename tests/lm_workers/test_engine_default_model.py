"""The engine on the real default model, in float32, against transformers itself."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from adapter_gen.apply import adapted, init_bases
from adapter_gen.hypernetwork import Generated
from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth, LoraDelta, SharedBases
from cluster_router.wire.types import AdapterKey, Assignment, SamplingParams, TokenizedRequest
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.engine import Engine
from lm_workers.models import auto_dtype, load_causal_lm, load_tokenizer

CONFIG = EngineConfig(dtype="float32", max_context=1024, max_batch_tokens=128)
OFF = Assignment(key=None)


@pytest.fixture(scope="module")
def model(default_model: Path) -> PreTrainedModel:
    return load_causal_lm(default_model, torch.float32, "cpu")


@pytest.fixture(scope="module")
def prompts(default_model: Path) -> list[tuple[int, ...]]:
    """50 real texts of 1 to 197 tokens: how modules of the standard library open."""
    tokenizer = load_tokenizer(default_model)
    found: list[tuple[int, ...]] = []
    for path in sorted(Path(inspect.__file__).parent.glob("*.py")):
        ids = tokenizer(path.read_text(encoding="utf-8")[:2000]).input_ids
        length = 1 + 4 * len(found)
        if len(ids) >= length and len(found) < 50:
            found.append(tuple(ids[:length]))
    assert len(found) == 50
    return found


def run(
    engine: Engine, requests: list[tuple[TokenizedRequest, LoraDelta | None]]
) -> list[list[int]]:
    for request, delta in requests:
        engine.add(request, delta)
    answers: dict[str, list[int]] = {request.request_id: [] for request, _ in requests}
    while engine.has_work:
        for chunk in engine.step():
            answers[chunk.request_id] += chunk.tokens
        engine.check_integrity()
    return list(answers.values())


def greedy(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return list(out[0, len(prompt) :].tolist())


def requests(prompts: list[tuple[int, ...]], count: int) -> list[TokenizedRequest]:
    sampling = SamplingParams(max_tokens=count, temperature=0)
    return [
        TokenizedRequest(str(number), prompt, sampling, OFF)
        for number, prompt in enumerate(prompts)
    ]


def test_greedy_equals_transformers_on_fifty_real_prompts(
    default_model: Path, model: PreTrainedModel, prompts: list[tuple[int, ...]]
) -> None:
    engine = build_engine(default_model, CONFIG)
    answers = run(engine, [(request, None) for request in requests(prompts, 12)])
    assert len({len(prompt) for prompt in prompts}) == 50
    for prompt, found in zip(prompts, answers, strict=True):
        assert found == greedy(model, prompt, 12)


@pytest.mark.parametrize("depth", ["head", "full", "paper"])
def test_adapted_equals_transformers_with_the_update_hooked_in(
    default_model: Path, model: PreTrainedModel, prompts: list[tuple[int, ...]], depth: Depth
) -> None:
    spec = discover_sites(model, depth, rank=16)
    bases = init_bases(spec, seed=0)
    random = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=random)

    bases = SharedBases(
        bases.u, bases.v, normal(bases.s0.shape, 0.1), normal(bases.shift.shape, 0.1)
    )
    deltas = []
    for cluster in range(3):
        static = LoraDelta.static(AdapterKey("b", "h", cluster, 0), spec)
        arrays = {
            name: normal(array.shape, 0.2).half().numpy() for name, array in static.arrays().items()
        }
        deltas.append(LoraDelta(static.key, **arrays))
    engine = build_engine(default_model, CONFIG, (spec, bases))
    chosen = requests(prompts[5:45:6], 8)
    pairs = [(request, deltas[number % 3]) for number, request in enumerate(chosen)]
    answers = run(engine, pairs)
    for (request, delta), found in zip(pairs, answers, strict=True):
        with adapted(model, spec, bases, Generated.of(delta)):
            assert found == greedy(model, request.prompt_tokens, 8)
    unadapted = [greedy(model, request.prompt_tokens, 8) for request in chosen]
    assert unadapted != answers


@pytest.mark.skipif(auto_dtype("cpu") != torch.bfloat16, reason="no native bfloat16 here")
def test_half_precision_gives_the_same_bits_alone_and_in_company(default_model: Path) -> None:
    engine = build_engine(default_model, CONFIG.model_copy(update={"dtype": "bfloat16"}))
    tokenizer = load_tokenizer(default_model)
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logprobs=5)
    texts = ["The history of the Roman empire is long and full of wars", "SELECT name FROM"]

    def first(count: int) -> list[float | None]:
        for number, text in enumerate(texts[:count]):
            prompt = tuple(tokenizer(text).input_ids)
            engine.add(TokenizedRequest(str(number), prompt, sampling, OFF), None)
        found: list[float | None] = []
        while engine.has_work:
            for chunk in engine.step():
                if chunk.request_id == "0":
                    found += [top.logprob for entry in chunk.logprobs for top in entry.top]
        return found

    assert first(1) == first(2)
