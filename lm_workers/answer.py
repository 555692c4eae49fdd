"""What every engine does alike with a request, whatever computes its tokens."""

from __future__ import annotations

from collections.abc import Container

from cluster_router.wire.errors import ContextLengthError, RequestError
from cluster_router.wire.types import TokenizedRequest
from lm_workers.sequence import Sequence


def check_request(
    request: TokenizedRequest, max_context: int, vocabulary: int, held: Container[str]
) -> None:
    """See that an engine can take `request`.

    Args:
        request: not queued yet.
        max_context: longest prompt plus output.
        vocabulary: ids of tokens are below.
        held: ids of the requests that the engine has.

    Raises:
        RequestError: the prompt is empty or holds what is no token, or the id is in use.
        ContextLengthError: prompt and output exceed the context.
    """
    params, length = request.sampling, len(request.prompt_tokens)
    if not length:
        raise RequestError("the prompt has no tokens", "prompt")
    wrong = [
        one
        for one in (min(request.prompt_tokens), max(request.prompt_tokens))
        if not 0 <= one < vocabulary
    ]
    if wrong:
        raise RequestError(
            f"the prompt holds token id {wrong[0]}; this model's ids are 0..{vocabulary - 1}",
            "prompt",
        )
    if length + params.max_tokens > max_context:
        raise ContextLengthError(
            f"{length} prompt tokens and max_tokens={params.max_tokens} exceed this engine's "
            f"context of {max_context} tokens",
            "max_tokens",
        )
    if request.request_id in held:
        raise RequestError(f"request id {request.request_id!r} is in use", "request_id")


def extend(sequence: Sequence, token: int, eos: frozenset[int]) -> str:
    """Append a chosen token, see whether the answer is over, and return the text now certain.

    Sets `finish_reason` and `stop_reason` of `sequence` when it is.
    """
    sequence.tokens.append(token)
    params = sequence.sampling
    text = ""
    may_stop = sequence.num_outputs >= params.min_tokens
    if token in eos and not params.ignore_eos:
        sequence.finish_reason = "stop"
    elif token in params.stop_token_ids:
        sequence.finish_reason, sequence.stop_reason = "stop", token
    else:
        text = sequence.detokenizer.push(token, may_stop)
        if sequence.detokenizer.stopped_by is not None:
            sequence.finish_reason = "stop"
            sequence.stop_reason = sequence.detokenizer.stopped_by
        elif sequence.num_outputs >= params.max_tokens:
            sequence.finish_reason = "length"
    if sequence.finish_reason is not None:
        text += sequence.detokenizer.flush()
    return text
