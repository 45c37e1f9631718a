"""Spans that a test keeps in memory, and looks at by their names."""

import json
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.traces import Traces

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CLIENT}-01"
"""The context of a client."""


class KeptTraces:
    """Traces whose spans stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.traces = Traces([SimpleSpanProcessor(self._exporter)], "test")

    @property
    def spans(self) -> list[ReadableSpan]:
        """Those that have ended, the first one first."""
        return list(self._exporter.get_finished_spans())

    def names(self) -> list[str]:
        """The names of all."""
        return [span.name for span in self.spans]

    def one(self, name: str) -> ReadableSpan:
        """The only span of that name."""
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def text(self) -> str:
        """All that a collector would get, as text."""
        return "".join(span.to_json() for span in self.spans)


def span_id(span: ReadableSpan) -> str:
    """The id in hexadecimal digits."""
    return f"{span.context.span_id:016x}"


def trace_id(span: ReadableSpan) -> str:
    """The id of its trace."""
    return f"{span.context.trace_id:032x}"


def parent_id(span: ReadableSpan) -> str:
    """The id of its parent, "" without one."""
    return f"{span.parent.span_id:016x}" if span.parent else ""


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """Its attributes as plain values."""
    found: dict[str, Any] = json.loads(span.to_json())["attributes"]
    return found
