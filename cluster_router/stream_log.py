"""One log line for each stream that has ended: what it was, and nothing that was said in it."""

from __future__ import annotations

import logging

from cluster_router.tally import StreamEnd
from cluster_router.wire.types import TokenizedRequest

logger = logging.getLogger(__name__)


def log_stream(_: TokenizedRequest, end: StreamEnd) -> None:
    """Log a stream's end, as a sentence and as fields for structured logs. A Traffic listener."""
    if not logger.isEnabledFor(logging.INFO):
        return
    adaptation = end.adaptation
    fields = {
        "stream": end.request_id,
        "namespace": end.namespace,
        "mode": adaptation.mode,
        "cluster": adaptation.cluster,
        "similarity": adaptation.similarity,
        "fallback": adaptation.fallback,
        "prompt_tokens": end.prompt_tokens,
        "cached_tokens": end.cached_tokens,
        "output_tokens": end.output_tokens,
        "first_token_s": _rounded(end.first_token_s),
        "seconds": _rounded(end.seconds),
        "outcome": end.finish_reason or end.error,
    }
    logger.info(
        "%s: %s after %.3f s, %d tokens under %s",
        end.request_id,
        end.finish_reason or end.error,
        end.seconds,
        end.output_tokens,
        adaptation.mode if adaptation.cluster is None else f"cluster {adaptation.cluster}",
        extra=fields,
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
