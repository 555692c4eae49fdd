"""The engine on small random models of three families, against transformers itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter_gen.apply import adapted, init_bases
from adapter_gen.hypernetwork import Generated
from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth, LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import ContextLengthError, ModelError, OverloadedError, RequestError
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    SamplingParams,
    TokenChunk,
    TokenizedRequest,
)
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.engine import Engine
from lm_workers.models import load_causal_lm
from lm_workers.models.config import load_config

DEPTHS: tuple[Depth, ...] = ("head", "full", "paper")
SMALL = EngineConfig(
    dtype="float32",
    max_sequences=4,
    max_batch_tokens=24,
    block_size=4,
    kv_cache_tokens=1024,
    cpu_threads=1,
)
NAMES = (f"r{number}" for number in range(10**9))


def request(prompt: Iterable[int], **params: object) -> TokenizedRequest:
    sampling = SamplingParams.model_validate({"max_tokens": 12, "temperature": 0, **params})
    return TokenizedRequest(next(NAMES), tuple(prompt), sampling, Assignment(key=None))


def drain(engine: Engine) -> dict[str, list[TokenChunk]]:
    chunks: dict[str, list[TokenChunk]] = {}
    while engine.has_work:
        for chunk in engine.step():
            chunks.setdefault(chunk.request_id, []).append(chunk)
        engine.check_integrity()
    return chunks


def tokens(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


def answer(engine: Engine, one: TokenizedRequest, delta: LoraDelta | None = None) -> list[int]:
    engine.add(one, delta)
    return tokens(drain(engine)[one.request_id])


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    source = random.Random(7)
    return [
        [source.randrange(2, 300) for _ in range(source.randint(1, longest))] for _ in range(count)
    ]


class Update:
    """Random bases and random deltas for a model, with no number left at zero."""

    def __init__(self, path: Path, depth: Depth) -> None:
        self.model = load_causal_lm(path, torch.float32, "cpu")
        self.spec: UpdateSpec = discover_sites(self.model, depth, rank=4, alpha=2.0)
        bases = init_bases(self.spec, seed=0)
        generator = torch.Generator().manual_seed(1)
        self._normal = lambda shape: torch.randn(shape, generator=generator)
        self.bases = SharedBases(
            bases.u, bases.v, self._normal(bases.s0.shape), self._normal(bases.shift.shape)
        )

    def delta(self, cluster: int) -> LoraDelta:
        key = AdapterKey("base", "hyper", cluster, 1)
        static = LoraDelta.static(key, self.spec)
        arrays = {
            name: self._normal(array.shape).half().numpy()
            for name, array in static.arrays().items()
        }
        return LoraDelta(key, **arrays)

    def greedy(self, prompt: list[int], delta: LoraDelta, count: int) -> list[int]:
        with adapted(self.model, self.spec, self.bases, Generated.of(delta)):
            return greedy(self.model, prompt, count)


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return list(out[0, len(prompt) :].tolist())


@pytest.fixture
def engine(tiny_llama: Path) -> Engine:
    return build_engine(tiny_llama, SMALL)


def test_unadapted_equals_transformers(tiny_checkpoint: Path) -> None:
    engine = build_engine(tiny_checkpoint, SMALL)
    model = load_causal_lm(tiny_checkpoint, torch.float32, "cpu")
    asked = [request(prompt) for prompt in prompts(12)]
    for one in asked:
        engine.add(one, None)
    answers = drain(engine)
    for one in asked:
        assert tokens(answers[one.request_id]) == greedy(model, list(one.prompt_tokens), 12)


@pytest.mark.parametrize("depth", DEPTHS)
def test_adapted_equals_transformers_with_the_update_hooked_in(
    tiny_checkpoint: Path, depth: Depth
) -> None:
    update = Update(tiny_checkpoint, depth)
    engine = build_engine(tiny_checkpoint, SMALL, (update.spec, update.bases))
    deltas = [update.delta(cluster) for cluster in range(3)]
    asked = [(request(prompt), deltas[i % 3]) for i, prompt in enumerate(prompts(9))]
    for one, delta in asked:
        engine.add(one, delta)
    answers = drain(engine)
    for one, delta in asked:
        expected = update.greedy(list(one.prompt_tokens), delta, 12)
        assert tokens(answers[one.request_id]) == expected
    # The updates matter: without this the test would pass on an engine that ignores them.
    plain = [greedy(update.model, list(one.prompt_tokens), 12) for one, _ in asked]
    assert plain != [tokens(answers[one.request_id]) for one, _ in asked]


@pytest.mark.parametrize("depth", DEPTHS)
def test_neighbours_of_any_cluster_change_nothing(tiny_llama: Path, depth: Depth) -> None:
    update = Update(tiny_llama, depth)
    engine = build_engine(tiny_llama, SMALL, (update.spec, update.bases))
    deltas = [None, *(update.delta(cluster) for cluster in range(6))]
    params = {"temperature": 1.0, "seed": 11, "top_p": 0.9, "logprobs": 1}
    asked = [(prompt, deltas[i % 7]) for i, prompt in enumerate(prompts(14))]
    alone = [answer(engine, request(prompt, **params), delta) for prompt, delta in asked]
    together = [(request(prompt, **params), delta) for prompt, delta in asked]
    for one, delta in together:
        engine.add(one, delta)
    answers = drain(engine)
    assert [tokens(answers[one.request_id]) for one, _ in together] == alone


def test_unadapted_rows_in_an_adapted_batch_are_the_base_model(tiny_llama: Path) -> None:
    update = Update(tiny_llama, "full")
    engine = build_engine(tiny_llama, SMALL, (update.spec, update.bases))
    plain, loud = request(prompts(1)[0]), request(prompts(2)[1])
    engine.add(plain, None)
    engine.add(loud, update.delta(0))
    expected = greedy(update.model, list(plain.prompt_tokens), 12)
    assert tokens(drain(engine)[plain.request_id]) == expected


def test_preemption_changes_no_token(tiny_llama: Path) -> None:
    tight = SMALL.model_copy(update={"kv_cache_tokens": 128, "max_context": 100})
    model = load_causal_lm(tiny_llama, torch.float32, "cpu")
    engine = build_engine(tiny_llama, tight)
    asked = [request(prompt, max_tokens=30, prompt_logprobs=0) for prompt in prompts(8)]
    for one in asked:
        engine.add(one, None)
    held = list(engine._sequences.values())
    answers = drain(engine)
    assert sum(sequence.preemptions for sequence in held) > 0
    for one in asked:
        assert tokens(answers[one.request_id]) == greedy(model, list(one.prompt_tokens), 30)
        first = answers[one.request_id][0].prompt_logprobs
        assert first is not None and len(first) == len(one.prompt_tokens)


def test_seeded_sampling_repeats_and_seeds_differ(engine: Engine) -> None:
    prompt = prompts(1)[0]
    drawn = [
        answer(engine, request(prompt, temperature=1.5, seed=seed))
        for seed in (1, 1, 2, None, None)
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn}) == 4


def test_prompt_logprobs_equal_transformers(engine: Engine, tiny_llama: Path) -> None:
    prompt = prompts(3)[2]
    one = request(prompt, max_tokens=0, prompt_logprobs=2)
    engine.add(one, None)
    [chunk] = drain(engine)[one.request_id]
    model = load_causal_lm(tiny_llama, torch.float32, "cpu")
    logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert chunk.finish_reason == "length" and chunk.tokens == ()
    assert chunk.prompt_logprobs is not None
    assert chunk.prompt_logprobs[0].logprob is None
    for position, entry in enumerate(chunk.prompt_logprobs[1:]):
        assert entry.token == prompt[position + 1]
        assert entry.logprob == pytest.approx(float(logprobs[position, entry.token]), abs=1e-4)
        assert [one.token for one in entry.top] == logprobs[position].topk(2).indices.tolist()


def test_half_precision_scores_the_tokens_of_the_prompt(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, SMALL.model_copy(update={"dtype": "bfloat16"}))
    prompt = [5, 257, 301, 319, 311]  # bfloat16 has no odd numbers from 257 on
    one = request(prompt, max_tokens=0, prompt_logprobs=0)
    engine.add(one, None)
    [chunk] = drain(engine)[one.request_id]
    assert chunk.prompt_logprobs is not None
    assert [entry.token for entry in chunk.prompt_logprobs] == prompt


def test_generated_logprobs_equal_transformers(engine: Engine, tiny_llama: Path) -> None:
    prompt = prompts(1)[0]
    one = request(prompt, logprobs=3)
    engine.add(one, None)
    chunks = drain(engine)[one.request_id]
    model = load_causal_lm(tiny_llama, torch.float32, "cpu")
    whole = torch.tensor([prompt + tokens(chunks)])
    logprobs = model(whole).logits[0].log_softmax(-1)
    for step, chunk in enumerate(chunks):
        [entry] = chunk.logprobs
        expected = float(logprobs[len(prompt) - 1 + step, entry.token])
        assert entry.logprob == pytest.approx(expected, abs=1e-4)
        assert entry.top[0].token == entry.token


def test_finish_reasons(engine: Engine) -> None:
    prompt = prompts(1)[0]
    plain = answer(engine, request(prompt))
    stopping = request(prompt, stop_token_ids=(plain[4],))
    engine.add(stopping, None)
    last = drain(engine)[stopping.request_id][-1]
    assert (last.finish_reason, last.stop_reason) == ("stop", plain[4])
    bounded = request(prompt, max_tokens=3)
    engine.add(bounded, None)
    assert drain(engine)[bounded.request_id][-1].finish_reason == "length"


def test_end_of_text_ends_unless_ignored(engine: Engine) -> None:
    forced = {"logit_bias": {1: 100.0}, "max_tokens": 5}
    one = request([5, 6, 7], **forced)
    engine.add(one, None)
    [chunk] = drain(engine)[one.request_id]
    assert (chunk.tokens, chunk.text, chunk.finish_reason) == ((1,), "", "stop")
    assert len(answer(engine, request([5, 6, 7], ignore_eos=True, **forced))) == 5
    assert len(answer(engine, request([5, 6, 7], min_tokens=3, **forced))) == 4


def test_text_joins_to_the_decoded_tokens(engine: Engine) -> None:
    one = request(prompts(1)[0], max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    engine.add(one, None)
    chunks = drain(engine)[one.request_id]
    tokenizer = engine._texts.tokenizer
    whole = tokenizer.decode(tokens(chunks), skip_special_tokens=True)
    assert "".join(chunk.text for chunk in chunks) == whole


def test_abort_at_any_moment_leaves_nothing_behind(engine: Engine) -> None:
    source = random.Random(3)
    asked = [request(prompt) for prompt in prompts(30)]
    pending = list(asked)
    while pending or engine.has_work:
        if pending and source.random() < 0.5:
            engine.add(pending.pop(), None)
        if source.random() < 0.3:
            engine.abort(source.choice(asked).request_id)
        engine.step()
        engine.check_integrity()
    assert engine.num_running == engine.num_waiting == 0


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], {}, RequestError),
        ([5, 10**6], {}, RequestError),
        ([-1, 5], {}, RequestError),
        (range(2, 130), {}, ContextLengthError),
        (range(2, 50), {"max_tokens": 100}, ContextLengthError),
    ],
)
def test_what_cannot_run_is_refused(
    engine: Engine, prompt: Iterable[int], params: dict[str, int], error: type[Exception]
) -> None:
    with pytest.raises(error):
        engine.add(request(prompt, **params), None)
    assert not engine.has_work


def test_the_last_id_of_the_vocabulary_is_taken_and_the_next_is_not(
    engine: Engine, tiny_llama: Path
) -> None:
    vocabulary = load_config(tiny_llama).vocab_size
    with pytest.raises(
        RequestError, match=f"{vocabulary}; this model's ids are 0..{vocabulary - 1}"
    ):
        engine.add(request([5, vocabulary]), None)
    engine.add(request([5, vocabulary - 1]), None)


def test_overload_refuses_and_what_was_accepted_finishes(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, SMALL.model_copy(update={"max_queued": 3}))
    accepted = [request(prompt) for prompt in prompts(3)]
    for one in accepted:
        engine.add(one, None)
    with pytest.raises(OverloadedError):
        engine.add(request([5]), None)
    assert len(drain(engine)) == 3


def test_a_model_that_does_more_than_the_engine_carries_is_refused(
    tiny_llama: Path, tmp_path: Path, edit_config: Callable[..., Path]
) -> None:
    granite = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    scaled = edit_config(tiny_llama, tmp_path / "granite", logits_scaling=7.0, **granite)
    with pytest.raises(ModelError, match="differ between transformers and the engine"):
        build_engine(scaled, SMALL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("depth", DEPTHS)
def test_cuda_equals_cpu(tiny_llama: Path, depth: Depth) -> None:
    update = Update(tiny_llama, depth)
    deltas = [update.delta(cluster) for cluster in range(3)]
    answers = []
    for device in ("cpu", "cuda"):
        config = SMALL.model_copy(update={"device": device})
        engine = build_engine(tiny_llama, config, (update.spec, update.bases))
        answers.append(
            [answer(engine, request(p), deltas[i % 3]) for i, p in enumerate(prompts(6))]
        )
    assert answers[0] == answers[1]


def test_background_requests_only_while_half_of_everything_is_free(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, SMALL)
    [prompt] = prompts(1)
    scoring = replace(request(prompt, max_tokens=0, prompt_logprobs=0), background=True)
    engine.add(scoring, None)
    assert len(drain(engine)[scoring.request_id][0].prompt_logprobs or ()) == len(prompt)
    engine.add(request(prompt), None)
    with pytest.raises(OverloadedError, match="background"):
        engine.add(scoring, None)  # one waits
    engine.step()
    engine.add(scoring, None)  # one of four runs
    engine.abort(scoring.request_id)
    engine.add(request(prompt), None)
    while engine.num_waiting:
        engine.step()
    with pytest.raises(OverloadedError, match="background"):
        engine.add(scoring, None)  # two of four run
    drain(engine)
    stats = engine.stats
    assert stats.generated_tokens == 24
    assert (stats.adapters, stats.adapter_loads, stats.adapter_evictions) == (0, 0, 0)
