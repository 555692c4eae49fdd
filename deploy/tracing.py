"""Where spans go. Named in the config file, off without it:

    tracing_config: {enabled: true, exporter_import_path: "deploy.tracing:otlp"}

Ray Serve then makes a span for each hop of a request and hands its context on; the spans of our own
parts (`chameleon.*`) are children of those.
"""

from __future__ import annotations

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from cluster_router.wire.errors import ConfigError


def otlp(_: str) -> list[SpanProcessor]:
    """Send spans by OTLP over HTTP, as the standard OTEL_EXPORTER_OTLP_* variables say.

    Raises:
        ConfigError: the exporter is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            "traces cannot be sent: install chameleon-llm[otlp], or take "
            "exporter_import_path out of tracing_config to write them to files",
            "tracing_config",
        ) from error
    return [BatchSpanProcessor(OTLPSpanExporter())]
