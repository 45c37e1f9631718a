"""Traces of the real service: both processes send their spans to a collector, and speech needs no collector."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.spans import CLIENT, TRACE, TRACEPARENT
from tests.system.service import Service, eventually, running_service

SPANS = 5
"""Of one request."""

SPEECH = "/v1/audio/speech"
HEADERS = {"traceparent": TRACEPARENT, "authorization": "Bearer sk-tts-secret"}


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans over HTTP as OTLP has them. While `gate` is cleared it answers nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.gate = threading.Event()
        self.gate.set()
        self.spans: list[tuple[str, Span]] = []
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        self.waiting = 0

    def take(self, path: str, body: bytes) -> None:
        """Keep the spans of a request, each with the name of its process."""
        self.paths.add(path)
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            told = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            assert told["service.name"] == "qwen3-tts-server"
            for scope in resource.scope_spans:
                self.spans += [(told["tts.process"], span) for span in scope.spans]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.waiting += 1
        self.server.gate.wait()
        self.server.take(self.path, body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_arguments: Any) -> None:
        """Print nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that answers."""
    with Collector() as collector:
        serving = threading.Thread(target=collector.serve_forever, daemon=True)
        serving.start()
        yield collector
        collector.gate.set()
        collector.shutdown()
        serving.join()


def _speak(service: Service) -> None:
    answer = service.http.post(SPEECH, json={"input": "A secret sentence.", "voice": "alloy"}, headers=HEADERS)
    assert answer.status_code == 200
    assert answer.content


def test_traces(tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace from the client over both processes; a collector that hangs delays neither speech nor the end."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    with running_service(tmp_path, OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}") as service:
        _speak(service)
        eventually(lambda: len(collector.spans) >= SPANS, 60, "all spans")
        names = {span.name: (process, span) for process, span in collector.spans}
        assert {name: process for name, (process, _) in names.items()} == {
            f"POST {SPEECH}": "web",
            **dict.fromkeys(("speak", "queue", "first_audio", "rest"), "gpu_worker"),
        }
        assert {span.trace_id.hex() for _, span in collector.spans} == {TRACE}
        request, speak = names[f"POST {SPEECH}"][1], names["speak"][1]
        assert request.parent_span_id.hex() == CLIENT
        assert speak.parent_span_id == request.span_id
        assert {names[name][1].parent_span_id for name in ("queue", "first_audio", "rest")} == {speak.span_id}
        assert request.start_time_unix_nano <= speak.start_time_unix_nano <= speak.end_time_unix_nano
        assert collector.paths == {"/v1/traces"}

        metrics = service.http.get("/metrics", headers={"accept": "application/openmetrics-text"}).text
        assert f'trace_id="{TRACE}"' in metrics

        collector.gate.clear()
        already = collector.waiting
        _speak(service)
        eventually(lambda: collector.waiting > already, 60, "the collector hangs")
        for _ in range(3):
            _speak(service)
    assert service.process.returncode == 0
    for secret in (b"secret", b"alloy"):
        assert not any(secret in body for body in collector.bodies)
