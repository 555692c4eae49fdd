"""Spans reach an OTLP collector as the standard variables say."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from deploy.tracing import otlp


def test_spans_are_sent_to_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "chameleon-test")
        provider = TracerProvider()
        for processor in otlp("ignored"):
            provider.add_span_processor(processor)
        with provider.get_tracer("test").start_as_current_span("chameleon.answer"):
            pass
        provider.force_flush()
        provider.shutdown()
        server.shutdown()
        thread.join()
    [(path, body)] = received
    assert path == "/v1/traces"
    [spans] = ExportTraceServiceRequest.FromString(body).resource_spans
    assert [span.name for span in spans.scope_spans[0].spans] == ["chameleon.answer"]
    assert "chameleon-test" in {one.value.string_value for one in spans.resource.attributes}
