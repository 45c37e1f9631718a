"""Traces are off unless a collector is named, a wrong one stops the start, and a dead one holds nothing up."""

import subprocess
import sys
import threading
import time

import pytest

from shared import traces as traces_module
from shared.settings import Settings
from shared.trace_settings import is_sampled, open_traces, trace_id_of, tracing_problems
from shared.traces import Traces, context_of
from tests.ports import free_port
from tests.spans import CLIENT, TRACE, TRACEPARENT, KeptTraces, parent_id, span_id, trace_id
from tests.system.service import ROOT, stretched

STANDARD = "OTEL_EXPORTER_OTLP_ENDPOINT"


class TestWhetherThereAreAny:
    """The settings and OpenTelemetry's own variables."""

    @pytest.mark.parametrize(
        ("setting", "environ"),
        [("", {}), ("", {STANDARD: " "}), ("http://c:4318", {"OTEL_SDK_DISABLED": "true"})],
    )
    def test_off(self, setting: str, environ: dict[str, str]) -> None:
        """Without a collector, or where the SDK is disabled."""
        assert open_traces(Settings(otlp_endpoint=setting), environ, "web") is None

    @pytest.mark.slow
    def test_off_imports_nothing(self) -> None:
        """Neither process then knows OpenTelemetry."""
        script = "import sys, server.app, gpu_worker.__main__; sys.exit('opentelemetry' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0

    @pytest.mark.parametrize(
        ("setting", "environ", "url"),
        [
            ("http://c:4318/", {STANDARD: "http://other"}, "http://c:4318/v1/traces"),
            ("", {STANDARD: "https://c/otlp"}, "https://c/otlp/v1/traces"),
            ("", {STANDARD: "http://c", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://t/in"}, "http://t/in"),
        ],
    )
    def test_on(self, monkeypatch: pytest.MonkeyPatch, setting: str, environ: dict[str, str], url: str) -> None:
        """The setting comes first; a variable for traces is the whole URL, the others lack its path."""
        opened: list[tuple[str, str]] = []
        monkeypatch.setattr(Traces, "to_collector", lambda url, process: opened.append((url, process)))
        open_traces(Settings(otlp_endpoint=setting), environ, "web")
        assert opened == [(url, "web")]
        assert tracing_problems(Settings(otlp_endpoint=setting), environ) == []

    @pytest.mark.parametrize(
        "url",
        ["collector", "collector:4318", "grpc://c:4317", "http://", "http://c:port", "http://c?key=1", "http://["],
    )
    def test_no_url(self, url: str) -> None:
        """It is refused by the name of its variable."""
        for setting, environ, variable in ((url, {}, "TTS_OTLP_ENDPOINT"), ("", {STANDARD: url}, STANDARD)):
            (problem,) = tracing_problems(Settings(otlp_endpoint=setting), environ)
            assert problem == f"{variable}: must be a URL such as http://127.0.0.1:4318"

    def test_secrets_in_the_url(self) -> None:
        """A password would stand in the log of each failed export."""
        (problem,) = tracing_problems(Settings(otlp_endpoint="http://me:secret@c"), {})
        assert "OTEL_EXPORTER_OTLP_HEADERS" in problem
        assert "secret" not in problem

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message says how to install the extra."""
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        (problem,) = tracing_problems(Settings(otlp_endpoint="http://c"), {})
        assert "[otel]" in problem

    def test_nothing_of_it_is_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the package above the exporter it is the same."""
        monkeypatch.setitem(sys.modules, "opentelemetry", None)
        monkeypatch.delitem(sys.modules, "opentelemetry.exporter", raising=False)
        (problem,) = tracing_problems(Settings(otlp_endpoint="http://c"), {})
        assert "[otel]" in problem


class TestSpans:
    """Parents, and the context for children in another process."""

    def test_a_context_from_outside(self) -> None:
        """It is the parent, and the children's context names the span."""
        kept = KeptTraces()
        span = kept.traces.begin("s", TRACEPARENT)
        assert context_of(span) == f"00-{TRACE}-{span_id(span)}-01"  # type: ignore[arg-type] # it is the SDK's
        span.end()
        assert (trace_id(kept.one("s")), parent_id(kept.one("s"))) == (TRACE, CLIENT)

    @pytest.mark.parametrize(
        "context",
        ["", "00", TRACEPARENT.upper(), f"ff-{TRACE}-{CLIENT}-01", f"00-{'0' * 32}-{CLIENT}-01", "x" * 100_000, "\0"],
    )
    def test_a_malformed_context(self, context: str) -> None:
        """A new trace begins."""
        kept = KeptTraces()
        kept.traces.begin("s", context).end()
        assert parent_id(kept.one("s")) == ""
        assert trace_id(kept.one("s")) != TRACE

    def test_a_client_that_keeps_no_trace(self) -> None:
        """The span is not kept either, and its children learn of no context."""
        kept = KeptTraces()
        span = kept.traces.begin("s", TRACEPARENT[:-1] + "0")
        span.end()
        assert (kept.spans, context_of(span)) == ([], "")

    def test_parts_of_a_context(self) -> None:
        """The id of the trace, and whether it is kept."""
        assert (trace_id_of(TRACEPARENT), trace_id_of("")) == (TRACE, "")
        assert (is_sampled(TRACEPARENT), is_sampled(TRACEPARENT[:-1] + "0"), is_sampled("")) == (True, False, False)

    def test_the_name_of_the_service(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """OpenTelemetry's variable replaces ours."""
        assert '"service.name": "qwen3-tts-server"' in _one_span()
        monkeypatch.setenv("OTEL_SERVICE_NAME", "my-voice")
        assert '"service.name": "my-voice"' in _one_span()


def test_a_dead_collector_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans beyond those that may wait are dropped at once, and the end of the process waits for a moment alone."""
    monkeypatch.setattr(traces_module, "_CLOSE_S", 0.05)
    threads = set(threading.enumerate())
    traces = Traces.to_collector(f"http://127.0.0.1:{free_port()}/v1/traces", "web")
    began = time.monotonic()
    for _ in range(3_000):
        traces.begin("s", "").end()
    traces.close()
    # The SDK would try each of the six batches again for ten seconds.
    assert time.monotonic() - began < stretched(10)
    for thread in set(threading.enumerate()) - threads:
        thread.join(stretched(10))
        assert not thread.is_alive(), thread.name


def _one_span() -> str:
    kept = KeptTraces()
    kept.traces.begin("s", "").end()
    return kept.text()
