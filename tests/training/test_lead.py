"""Windows of a tokenizer that puts a token before any text, as it does before a served prompt."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from adapter_gen.apply import init_bases
from cluster_router.embedding import TokenEmbedder
from cluster_router.prompts import PromptEncoder
from cluster_router.wire.errors import ConfigError
from cluster_router.wire.types import GenerateRequest
from lm_workers.models import load_tokenizer
from training.base import FrozenBase
from training.clusters import embed_contexts, idf_weights
from training.config import DataSettings, PrototypeSettings, TrainSettings
from training.corpus import Corpus
from training.data import Document, Window, WindowCutter
from training.dialogue import DialogueCutter
from training.evaluation.caches import CacheCase, unigram_probabilities
from training.evaluation.groups import GroupReader
from training.evaluation.settings import EvaluateSettings
from training.full import WindowBatches
from training.prototypes import Prototypes
from training.runtime import InProcess
from training.shares import Seed, Split

TEXT = "the quick brown fox jumps over the lazy dog Paris is the capital of France " * 20
BEGIN = 0
"""Id of the token in front."""


@pytest.fixture(scope="module")
def leading(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    """The tiny Llama with a tokenizer that begins each text as those of Llama 3 or Mistral do."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("leading") / "llama")
    tokenizer = load_tokenizer(folder)
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    return FrozenBase(folder)


def _windows(base: FrozenBase) -> list[Window]:
    cutter = WindowCutter(base.tokenizer, context=16, scored=24)
    return cutter.windows(Document(TEXT, "animals"), 3)


def test_a_tokenizer_that_adds_nothing_leads_with_nothing(base: FrozenBase) -> None:
    cutter = WindowCutter(base.tokenizer, context=16, scored=24)
    assert (cutter.lead, cutter.longest) == ((), 40)
    for window in _windows(base):
        assert (window.lead, window.context, len(window.tokens)) == (0, 16, 40)
        np.testing.assert_array_equal(window.content_tokens, window.context_tokens)


def test_a_window_begins_as_the_served_prompt_does(leading: FrozenBase) -> None:
    window = _windows(leading)[0]
    encoder = PromptEncoder(leading.tokenizer, 10_000, len(leading.head), embedding_tokens=16)
    served = encoder.encode(GenerateRequest(prompt=TEXT))
    assert served.prompt_tokens[0] == BEGIN
    assert served.prompt_tokens[:41] == tuple(window.tokens)
    assert served.content_tokens == tuple(window.content_tokens)


def test_every_window_has_it_in_front_and_is_else_the_same(
    base: FrozenBase, leading: FrozenBase, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    plain, led = (
        [
            *_windows(one),
            *WindowCutter(one.tokenizer, 16, 24).cut_running_text(path, "text", 3),
        ]
        for one in (base, leading)
    )
    assert len(led) == 6
    for window, like in zip(led, plain, strict=True):
        assert window.tokens.tolist() == [BEGIN, *like.tokens]
        assert (window.lead, window.context) == (1, 17)
        np.testing.assert_array_equal(window.targets, like.targets)
        assert window.scored_bytes == like.scored_bytes


def test_it_reaches_no_embedding_weight_or_count(base: FrozenBase, leading: FrozenBase) -> None:
    plain, led = _windows(base), _windows(leading)
    embedder = TokenEmbedder(base.embedding)
    np.testing.assert_array_equal(embed_contexts(led, embedder), embed_contexts(plain, embedder))
    weights = [idf_weights(windows, base.embedding) for windows in (led, plain)]
    np.testing.assert_array_equal(*weights)
    counts = [unigram_probabilities(CacheCase(w[0], w[1:])) for w in (led, plain)]
    np.testing.assert_array_equal(*counts)


def test_training_scores_no_token_of_it() -> None:
    led = [Window(np.arange(12, dtype=np.int32), 6, "d", 6, lead=3)] * 4
    batches = WindowBatches(led, documents=4, positions=100, seed=Seed(0, "static"))
    (share,) = batches.draw(1, Split())
    assert sorted(set(share.batch.places.tolist())) == list(range(3, 12))


def test_a_prototype_is_refined_on_texts_that_begin_with_it(
    leading: FrozenBase, settings: TrainSettings
) -> None:
    spec = leading.spec("full", 2)
    few = settings.model_copy(update={"prototypes": PrototypeSettings(documents=3, tokens=5)})
    prototypes = Prototypes(leading, spec, init_bases(spec, 0), few, InProcess())
    led = _windows(leading)
    prompts = prototypes._prompts(led, np.zeros(len(led), np.int64), 0)
    expected = [window.tokens[:6].tolist() for window in led]
    assert sorted(prompt.tolist() for prompt in prompts) == sorted(expected)


def test_it_is_no_part_of_a_question(leading: FrozenBase) -> None:
    tokenizer = load_tokenizer(leading.path)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    document = Document("what is it\nAnswer: a fox", "quiz")
    window = WindowCutter(tokenizer, 4, 40).cut(document)
    assert window is not None
    cutter = DialogueCutter(tokenizer, {"quiz": "\nAnswer: "}, share=1.0, size=60)
    (rewritten,) = cutter.rewrite([window])
    assert tokenizer.decode(rewritten.tokens.tolist()).startswith("[user] what is it")


def test_it_counts_towards_the_models_context(
    leading: FrozenBase, base: FrozenBase, data: Path, tmp_path: Path
) -> None:
    settings = DataSettings(context_tokens=64, scored_tokens=64)
    Corpus.open(data, settings, base, tmp_path)
    with pytest.raises(ConfigError, match=r"129 tokens do not fit .* context of 128"):
        Corpus.open(data, settings, leading, tmp_path)
    with pytest.raises(ConfigError, match=r"129 tokens do not fit .* context of 128"):
        GroupReader.open(data, leading, ["animals"], settings, EvaluateSettings(), tmp_path)
