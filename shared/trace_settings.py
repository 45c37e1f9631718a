"""The settings of traces: whether there are any, and which collector gets them.

Off, and OpenTelemetry is not even imported, unless TTS_OTLP_ENDPOINT or OpenTelemetry's own variable names a collector.
shared/traces.py makes the spans. A span has no text, no key and no voice in it.
"""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from shared.settings import Settings, variable_of

if TYPE_CHECKING:
    from shared.traces import Traces

_SAMPLED: Final = "-01"
_PATH: Final = "/v1/traces"
_OF_TRACES: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_OF_EVERYTHING: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"


def open_traces(settings: Settings, environ: Mapping[str, str], process: str) -> "Traces | None":
    """The traces of this process, or None if they are off. Call it in the process itself: it starts a thread."""
    _, url = _endpoint(settings, environ)
    if not url or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    from shared.traces import Traces  # noqa: PLC0415 -- an optional extra, and half a second to import

    return Traces.to_collector(url, process)


def tracing_problems(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """The problems of tracing: a wrong URL of the collector, or missing packages."""
    variable, url = _endpoint(settings, environ)
    if not url:
        return []
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        return [f"{variable}: must be a URL such as http://127.0.0.1:4318"]
    if parts.username is not None or parts.password is not None:
        return [f"{variable}: must have no user and password; OTEL_EXPORTER_OTLP_HEADERS is for them"]
    if not _is_installed():
        return [f"{variable}: OpenTelemetry is not installed; install it with `pip install -e '.[otel]'`"]
    return []


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter") is not None
    except ModuleNotFoundError:  # it has no parent
        return False


def trace_id_of(traceparent: str) -> str:
    """The id of the trace, "" without one."""
    return traceparent.split("-")[1] if traceparent else ""


def is_sampled(traceparent: str) -> bool:
    """True if the trace is kept."""
    return traceparent.endswith(_SAMPLED)


def _endpoint(settings: Settings, environ: Mapping[str, str]) -> tuple[str, str]:
    """The variable that names the collector, and the URL for traces; both "" without one."""
    if settings.otlp_endpoint:
        return variable_of("otlp_endpoint"), settings.otlp_endpoint.rstrip("/") + _PATH
    if url := environ.get(_OF_TRACES, "").strip():
        return _OF_TRACES, url
    if url := environ.get(_OF_EVERYTHING, "").strip():
        return _OF_EVERYTHING, url.rstrip("/") + _PATH
    return "", ""
