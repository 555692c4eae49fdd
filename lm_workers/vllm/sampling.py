"""Sampling parameters as vLLM has them, and which of ours it cannot honour."""

from __future__ import annotations

from pathlib import Path

from vllm import SamplingParams as VllmParams
from vllm.sampling_params import RequestOutputKind

from cluster_router.wire.errors import RequestError
from cluster_router.wire.types import SamplingParams
from lm_workers.vllm.adapters import ARGUMENT


def convert(params: SamplingParams, eos: frozenset[int], shift: Path | None) -> VllmParams:
    """What vLLM is asked for.

    Stop strings are not its business: it sees no text. Tokens that end an answer are told as stop
    tokens, so that `min_tokens` holds them back. Without `max_tokens` one is computed and dropped.

    Args:
        params: ours.
        eos: token ids that end an answer.
        shift: file of `HeadShift`.
    """
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    most = max(1, params.max_tokens)
    return VllmParams(
        max_tokens=most,
        min_tokens=min(params.min_tokens, most),
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        stop_token_ids=sorted(stops),
        ignore_eos=True,
        seed=None if params.seed is None else params.seed % 2**63,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if shift is None else {ARGUMENT: str(shift)},
    )


def refuse_unscored(params: SamplingParams) -> None:
    """Refuse what vLLM cannot score once `HeadShift` is in use, which sees no prompt positions and
    comes after the log-probabilities that vLLM calls raw.

    Raises:
        RequestError: prompt log-probabilities, or log-probabilities of tokens that are not chosen
            from the model's own distribution.
    """
    if params.prompt_logprobs is not None:
        raise RequestError(
            "this service runs vLLM with a bundle, which cannot score a prompt; "
            "ask without `echo` and prompt log-probabilities, or of the built-in engine",
            "logprobs",
        )
    if params.logprobs is not None and not _unedited(params):
        raise RequestError(
            "this service runs vLLM with a bundle: it gives log-probabilities only at temperature "
            "0 or 1, without top_p, top_k, min_p, penalties, logit_bias and min_tokens",
            "logprobs",
        )


def refuse_unspeculative(params: SamplingParams) -> None:
    """Refuse what vLLM leaves out under speculative decoding.

    Raises:
        RequestError: min_p or logit_bias.
    """
    for name in ("min_p", "logit_bias"):
        if getattr(params, name):
            raise RequestError(
                f"{name} cannot be had of this service, which decodes speculatively; leave it out",
                name,
            )


def _unedited(params: SamplingParams) -> bool:
    """Whether tokens are chosen from the model's own distribution, or are its most likely ones."""
    return (
        params.temperature in {0.0, 1.0}
        and params.top_p == 1
        and params.repetition_penalty == 1
        and not (params.top_k or params.min_p or params.logit_bias or params.min_tokens)
        and not (params.presence_penalty or params.frequency_penalty)
    )
