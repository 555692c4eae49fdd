from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cluster_router.prompts import PromptEncoder, following_text
from cluster_router.wire.errors import ContextLengthError, RequestError
from cluster_router.wire.types import GenerateRequest, Message, SamplingParams


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def chat(*turns: tuple[str, str], max_tokens: int = 1) -> GenerateRequest:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return GenerateRequest(messages=messages, sampling=SamplingParams(max_tokens=max_tokens))


def test_text_and_its_tokens_are_the_same_prompt(
    prompts: PromptEncoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = prompts.encode(GenerateRequest(prompt="sail wind"))
    assert text.prompt_tokens == (0, *ids(tokenizer, "sail wind"))
    assert text.content_tokens == ids(tokenizer, "sail wind")
    assert prompts.encode(GenerateRequest(prompt_tokens=text.prompt_tokens)) == text
    assert prompts.lead == (0,), "what is put before any text"


def test_messages_are_read_through_the_template_but_judged_by_their_words(
    prompts: PromptEncoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    got = prompts.encode(chat(("system", "law"), ("user", "sail wind")))
    rendered = "<s> system law <s> user sail wind <s> assistant"
    assert got.prompt_tokens == ids(tokenizer, rendered)
    assert got.content_tokens == ids(tokenizer, "law sail wind")


def test_developer_speaks_as_system_where_the_template_knows_no_developer(
    prompts: PromptEncoder,
) -> None:
    developer, system = (prompts.encode(chat((role, "law"))) for role in ("developer", "system"))
    assert developer == system


def test_a_prompt_that_holds_an_answer_says_so(prompts: PromptEncoder) -> None:
    first, earlier = ("user", "sail wind"), ("assistant", "mast")
    assert not prompts.encode(chat(("system", "law"), first)).answered
    assert not prompts.encode(GenerateRequest(prompt="sail")).answered
    assert prompts.encode(chat(first, earlier, ("user", "law"))).answered


def test_a_prompt_of_special_tokens_alone_is_its_own_content(prompts: PromptEncoder) -> None:
    assert prompts.encode(GenerateRequest(prompt="<s>")).content_tokens == (0, 0)


def test_the_embedding_sees_the_beginning_only(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = PromptEncoder(tokenizer, 32, len(tokenizer), embedding_tokens=3)
    short = prompts.encode(GenerateRequest(prompt="sail mast wind"))
    long = prompts.encode(GenerateRequest(prompt="sail mast wind court judge law"))
    assert long.content_tokens == short.content_tokens == ids(tokenizer, "sail mast wind")
    turns = [("user", "sail mast"), ("assistant", "wind court"), ("user", "law")]
    assert prompts.encode(chat(*turns)).content_tokens == short.content_tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "not none"),
        ({"prompt": "sail", "prompt_tokens": (2,)}, "not prompt and prompt_tokens"),
        ({"prompt_tokens": ()}, "prompt is empty"),
        ({"messages": ()}, "messages hold no text"),
        ({"messages": (Message(role="user", content=""),)}, "messages hold no text"),
        ({"prompt": "sail \ud83d"}, "surrogate"),
        ({"messages": (Message(role="user", content="\udc00"),)}, "surrogate"),
        ({"prompt_tokens": (2, 12)}, "token id 12"),
        ({"messages": (Message(role="tool", content="law"),)}, "no tools here"),
        ({"prompt": "law", "sampling": SamplingParams(logit_bias={99: 1.0})}, "logit_bias"),
        ({"prompt": "law", "sampling": SamplingParams(stop_token_ids=(99,))}, "stop_token_ids"),
    ],
)
def test_unusable_requests_are_refused_by_name(
    prompts: PromptEncoder, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        prompts.encode(GenerateRequest(**fields))


def test_an_empty_text_is_refused_where_nothing_is_put_in_front(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        chat_template=None,
    )
    bare.backend_tokenizer.post_processor = None
    prompts = PromptEncoder(bare, 32, len(bare))
    with pytest.raises(RequestError, match="prompt is empty"):
        prompts.encode(GenerateRequest(prompt=""))
    with pytest.raises(RequestError, match="no chat template"):
        prompts.encode(chat(("user", "law")))


def test_context_is_filled_to_the_last_token_and_no_further(prompts: PromptEncoder) -> None:
    tokens = (2,) * 20
    for max_tokens in (0, 12):
        request = GenerateRequest(
            prompt_tokens=tokens, sampling=SamplingParams(max_tokens=max_tokens)
        )
        assert prompts.encode(request).prompt_tokens == tokens
    with pytest.raises(ContextLengthError, match=r"32 tokens.*33: 20 in the prompt and 13") as full:
        prompts.encode(
            GenerateRequest(prompt_tokens=tokens, sampling=SamplingParams(max_tokens=13))
        )
    assert full.value.param == "max_tokens"
    assert prompts.remaining(tokens) == 12
    assert prompts.remaining((2,) * 40) == 0


def test_a_prompt_longer_than_the_context_is_itself_at_fault(prompts: PromptEncoder) -> None:
    with pytest.raises(ContextLengthError) as text:
        prompts.encode(GenerateRequest(prompt="law " * 40, sampling=SamplingParams(max_tokens=0)))
    with pytest.raises(ContextLengthError) as messages:
        prompts.encode(chat(("user", "law " * 40)))
    assert (text.value.param, messages.value.param) == ("prompt", "messages")


def test_token_text(prompts: PromptEncoder, tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompts.token_text(ids(tokenizer, "judge")[0]) == " judge"
    with pytest.raises(RequestError, match="12"):
        prompts.token_text(12)


def test_a_token_keeps_its_leading_space_where_the_decoder_cuts_it_off() -> None:
    """As Llama 2's and Mistral's do."""
    vocabulary = {"<unk>": 0, "▁a": 1, "▁kitchen": 2, "ette": 3}
    tokens = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokens.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens)
    assert tokenizer.decode([2]) == "kitchen"
    assert [following_text(tokenizer)(token) for token in (2, 3)] == [" kitchen", "ette"]
