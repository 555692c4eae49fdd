"""Spans of a router, through OpenTelemetry's API: nothing is done unless tracing is set up."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from opentelemetry import trace
from opentelemetry.trace import Span

from cluster_router.tally import StreamEnd
from cluster_router.wire.types import TokenizedRequest

tracer = trace.get_tracer("chameleon.router")


def preparing() -> AbstractContextManager[Span]:
    """A span of a request's preparation. Errors are left out of it: they may quote the request."""
    return tracer.start_as_current_span(
        "chameleon.prepare", record_exception=False, set_status_on_exception=False
    )


def trace_stream(request: TokenizedRequest, end: StreamEnd) -> None:
    """Make a span of a stream that has just ended, in its caller's trace. A Traffic listener."""
    if not trace.get_current_span().is_recording():
        return
    now = time.time_ns()
    begun = now - int(end.seconds * 1e9)
    span = tracer.start_span("chameleon.answer", start_time=begun)
    adaptation = end.adaptation
    attributes = {
        "chameleon.request_id": request.request_id,
        "chameleon.mode": adaptation.mode,
        "chameleon.cluster": adaptation.cluster,
        "chameleon.similarity": adaptation.similarity,
        "chameleon.adapter_key": adaptation.adapter_key,
        "chameleon.fallback": adaptation.fallback,
        "chameleon.prompt_tokens": end.prompt_tokens,
        "chameleon.cached_tokens": end.cached_tokens,
        "chameleon.output_tokens": end.output_tokens,
        "chameleon.outcome": end.finish_reason or end.error,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    if end.first_token_s is not None:
        span.add_event("first token", timestamp=begun + int(end.first_token_s * 1e9))
    span.end(now)
