"""A collector of traces on the loopback: OpenTelemetry's protocol over HTTP."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans. While `gate` is cleared it answers nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
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


@contextlib.contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector that answers."""
    with Collector() as collector:
        serving = threading.Thread(target=collector.serve_forever, daemon=True)
        serving.start()
        yield collector
        collector.gate.set()
        collector.shutdown()
        serving.join()
