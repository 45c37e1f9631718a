"""Traces of the real service: both processes send their spans to a collector, and speech needs no collector."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.spans import CLIENT, TRACE, TRACEPARENT
from tests.system.collector import Collector, running_collector
from tests.system.service import Service, eventually, running_service

SPANS = 5
"""Of one request."""

SPEECH = "/v1/audio/speech"
HEADERS = {"traceparent": TRACEPARENT, "authorization": "Bearer sk-tts-secret"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector that answers."""
    with running_collector() as collector:
        yield collector


def _speak(service: Service) -> None:
    answer = service.http.post(SPEECH, json={"input": "A secret sentence.", "voice": "alloy"}, headers=HEADERS)
    assert answer.status_code == 200
    assert answer.content


def test_traces(tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace from the client over both processes; a collector that hangs delays neither speech nor the end."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    with running_service(tmp_path, OTLP_ENDPOINT=collector.url) as service:
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
