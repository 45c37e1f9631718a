"""Spans of requests in the GPU worker, made from the times of each request when it is over.

    speak                from the arrival to the last message
    ├─ queue             to the slot
    │  └─ load           to the moment at which the model was ready
    ├─ first_audio       from the slot to the first audio
    └─ rest              to the last audio

Owned by the synthesis thread: the spans of a request cost it 0.2 ms, and a thread of OpenTelemetry's sends them.
"""

import time
from collections.abc import Callable
from typing import Final

from opentelemetry.trace import Span, SpanKind, StatusCode

from gpu_worker.engines.base import JobError
from gpu_worker.requests import Cancelled, Ending, Request
from shared.protocol import SpeechError, speech_id_of
from shared.trace_settings import is_sampled
from shared.traces import Traces

_NS: Final = 1_000_000_000


class RequestTraces:
    """Makes the spans of requests whose web worker traces them. `clock` is that of their times."""

    def __init__(self, traces: Traces, clock: Callable[[], float]) -> None:
        self._traces = traces
        self._clock = clock

    def record(self, request: Request, ending: Ending) -> None:
        """Make the spans of a request whose last message is sent, or that was cancelled."""
        if not is_sampled(request.traceparent):
            return
        now = self._clock()
        epoch_ns = time.time_ns() - round(now * _NS)

        def at(seconds: float) -> int:
            return epoch_ns + round(seconds * _NS)

        def add(name: str, parent: Span, begin: float, end: float) -> Span:
            span = self._traces.begin(name, parent, start_ns=at(begin))
            span.end(at(max(begin, end)))
            return span

        speak = self._traces.begin(
            "speak",
            request.traceparent,
            kind=SpanKind.SERVER,
            start_ns=at(request.arrived_at),
            attributes={
                "tts.model": request.model,
                "tts.speech_id": speech_id_of(request.id),
                "tts.outcome": ending,
                "tts.audio_seconds": round(request.audio_s, 3),
            },
        )
        started_at, first_audio_at = request.started_at, request.first_audio_at
        queued_until = request.ended_at if started_at is None else started_at
        queue = add("queue", speak, request.arrived_at, queued_until)
        if request.model_ready_at > request.arrived_at:
            add("load", queue, request.arrived_at, min(request.model_ready_at, queued_until))
        if started_at is not None:
            add("first_audio", speak, started_at, request.ended_at if first_audio_at is None else first_audio_at)
        if first_audio_at is not None:
            add("rest", speak, first_audio_at, request.ended_at)
        error = request.outcome.error if isinstance(request.outcome, Cancelled) else request.outcome
        if isinstance(error, JobError | SpeechError):
            speak.set_attribute("error.type", error.code)
            speak.set_status(StatusCode.ERROR)
        speak.end(at(now))
