"""Traces: makes spans with OpenTelemetry's SDK, and sends them to a collector from a thread of its own.

A collector that cannot be reached costs spans, never speech: at most 2,048 wait, and more are dropped.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import Final, Self

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

_NAME: Final = "qwen3-tts-server"
_CLOSE_S: Final = 2.0
"""How long the end of a process may wait for its last spans; the SDK would wait for a dead collector for 30 s."""

_HEADER: Final = "traceparent"
_propagator: Final = TraceContextTextMapPropagator()


class Traces:
    """The spans of one process. `close` sends the last ones."""

    def __init__(self, processors: Iterable[SpanProcessor], process: str) -> None:
        resource = Resource.create({"tts.process": process})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
            resource = resource.merge(Resource({SERVICE_NAME: _NAME}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for processor in processors:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer(_NAME)

    @classmethod
    def to_collector(cls, url: str, process: str) -> Self:
        """Traces that go to the collector at `url`."""
        return cls([_Batches(OTLPSpanExporter(endpoint=url))], process)

    def begin(
        self,
        name: str,
        parent: str | Span,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        start_ns: int | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> Span:
        """A span that begins now, or did at `start_ns` (Unix time). `parent` is a span, or a W3C context.

        A context that is "" or malformed begins a new trace.
        """
        if isinstance(parent, Span):
            context = set_span_in_context(parent, Context())
        else:
            context = _propagator.extract({_HEADER: parent}, Context())
        return self._tracer.start_span(name, context, kind=kind, start_time=start_ns, attributes=attributes)

    def close(self) -> None:
        """Send what is there, for _CLOSE_S at most."""
        self._provider.shutdown()


class _Batches(BatchSpanProcessor):
    """Sends spans in batches from a thread, which ends in time."""

    def shutdown(self) -> None:
        """Wait for the last batches for _CLOSE_S, then give up those that are left."""
        closing = threading.Thread(target=super().shutdown, name="close-traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)
        if closing.is_alive():
            self.span_exporter.shutdown()


def context_of(span: Span) -> str:
    """The span as the W3C context of its children; "" if it is not kept."""
    carrier: dict[str, str] = {}
    if span.is_recording():
        _propagator.inject(carrier, set_span_in_context(span, Context()))
    return carrier.get(_HEADER, "")
