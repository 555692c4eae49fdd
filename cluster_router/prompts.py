"""From a GenerateRequest to token ids: what the model reads, and what its cluster is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from cluster_router.wire.errors import ContextLengthError, RequestError
from cluster_router.wire.types import GenerateRequest, Message, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A request in tokens.

    `prompt_tokens` is what the model reads. `content_tokens` is what the embedding sees: the
    caller's own words, without the chat template, without special tokens, and no more than the
    encoder's `embedding_tokens` of them. Neither is empty. With `answered` one of the messages is
    the assistant's, so that part of the prompt is an answer.
    """

    prompt_tokens: tuple[int, ...]
    content_tokens: tuple[int, ...]
    answered: bool = False


def leading_tokens(tokenizer: Callable[..., Mapping[str, Any]]) -> tuple[int, ...]:
    """Token ids that a tokenizer itself puts before any text, such as BOS; many put none."""
    text, whole = (
        list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True)
    )
    places = [at for at in range(len(whole)) if whole[at : at + len(text)] == text]
    return tuple(whole[: places[0]]) if places else ()


def following_text(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """A function that gives the text of one token as it reads after another.

    Alone, a decoder of SentencePiece's kind would cut its leading space, and with that all that
    tells a word from a fragment of one.
    """
    before = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
    cut = str(tokenizer.decode(before))

    def text(token: int) -> str:
        both = str(tokenizer.decode([*before, token]))
        return both[len(cut) :] if both.startswith(cut) else str(tokenizer.decode([token]))

    return text


class PromptEncoder:
    """Tokenises requests and refuses those the model cannot serve.

    A prompt is assigned by its first `embedding_tokens` content tokens. The beginning is used
    because it stays as a conversation grows, so that a later turn finds the cluster, and the cached
    prefix, of the turns before it.

    Args:
        tokenizer: the base model's transformers tokenizer.
        context_length: most tokens the model takes, prompt and output together.
        vocab_size: token ids are valid below this.
        embedding_tokens: how many content tokens the embedding sees.

    Attributes:
        lead: see `leading_tokens`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int,
        vocab_size: int,
        embedding_tokens: int = 256,
    ) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._vocab_size = vocab_size
        self._embedding_tokens = embedding_tokens
        self._special = frozenset(tokenizer.all_special_ids)
        self.lead = leading_tokens(tokenizer)
        self._following = following_text(tokenizer)

    def encode(self, request: GenerateRequest) -> EncodedPrompt:
        """Tokenise `request` and check that it fits.

        Raises:
            RequestError: not exactly one prompt, an empty one, text that is not valid Unicode, a
                token id outside the vocabulary, or messages where there is no chat template.
            ContextLengthError: prompt and `max_tokens` exceed the context.
        """
        _check_one_prompt(request)
        self._check_sampling(request.sampling)
        if request.messages is not None:
            encoded = self._encode_messages(request.messages)
        else:
            tokens = self._prompt_tokens(request)
            encoded = EncodedPrompt(tokens, self._content(tokens))
        source = "prompt" if request.messages is None else "messages"
        self._check_length(len(encoded.prompt_tokens), request.sampling.max_tokens, source)
        return encoded

    def remaining(self, prompt_tokens: Sequence[int]) -> int:
        """How many tokens the context has left after `prompt_tokens`; never below 0."""
        return max(0, self._context_length - len(prompt_tokens))

    def token_text(self, token: int) -> str:
        """Text of one token, see `following_text`.

        Raises:
            RequestError: the id lies outside the vocabulary.
        """
        self._check_ids([token], "token")
        return self._following(token)

    def text(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text of `tokens`, without special ones unless `special`."""
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _prompt_tokens(self, request: GenerateRequest) -> tuple[int, ...]:
        if request.prompt is not None:
            tokens = tuple(self._tokenize(request.prompt, "prompt"))
        else:
            tokens = request.prompt_tokens or ()
            self._check_ids(tokens, "prompt")
        if not tokens:
            raise RequestError("the prompt is empty; send at least one token", "prompt")
        return tokens

    def _encode_messages(self, messages: Sequence[Message]) -> EncodedPrompt:
        template = self._tokenizer.chat_template
        if not template:
            raise RequestError(
                f"the tokenizer of {self._tokenizer.name_or_path or 'this model'} has no chat "
                "template, so it takes no messages; send a prompt instead",
                "messages",
            )
        content: list[int] = []
        for message in messages:
            content += self._tokenize(message.content, "messages", special=False)
        if not content:
            raise RequestError("the messages hold no text; send at least one token", "messages")
        return EncodedPrompt(
            self._render(messages, str(template)),
            self._content(content),
            answered=any(message.role == "assistant" for message in messages),
        )

    def _render(self, messages: Sequence[Message], template: str) -> tuple[int, ...]:
        turns = [message.model_dump(exclude_none=True) for message in messages]
        for turn in turns:
            # `developer` is OpenAI's later name for `system`; most templates know only the latter.
            if turn["role"] == "developer" and "developer" not in template:
                turn["role"] = "system"
        try:
            tokens = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from None
        return tuple(tokens)

    def _tokenize(self, text: str, param: str, special: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{param} is not valid Unicode: it holds half of a surrogate pair", param
            ) from None
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def _content(self, tokens: Sequence[int]) -> tuple[int, ...]:
        # Special tokens say nothing of the topic, but a prompt may consist of them alone.
        content = [token for token in tokens if token not in self._special] or tokens
        return tuple(content[: self._embedding_tokens])

    def _check_sampling(self, sampling: SamplingParams) -> None:
        self._check_ids(sampling.logit_bias, "logit_bias")
        self._check_ids(sampling.stop_token_ids, "stop_token_ids")

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"{param} holds token id {wrong}; this model's ids are 0..{self._vocab_size - 1}",
                param,
            )

    def _check_length(self, prompt: int, output: int, source: str) -> None:
        if prompt + output <= self._context_length:
            return
        raise ContextLengthError(
            f"the model's context is {self._context_length} tokens, but this request needs "
            f"{prompt + output}: {prompt} in the prompt and {output} for max_tokens; "
            "shorten the prompt or lower max_tokens",
            source if prompt > self._context_length else "max_tokens",
        )


def _check_one_prompt(request: GenerateRequest) -> None:
    given = [
        name
        for name in ("prompt", "prompt_tokens", "messages")
        if getattr(request, name) is not None
    ]
    if len(given) != 1:
        raise RequestError(
            "send exactly one of prompt, prompt_tokens and messages, "
            f"not {' and '.join(given) or 'none'}",
            given[0] if given else "prompt",
        )
