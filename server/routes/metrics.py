"""GET /metrics: the worker's figures in Prometheus' text format, all from the snapshot.

Counters live in the one GPU worker, so any web worker gives the same answer and none has to share memory with others;
only the restarts are those that the web worker which answers has seen.
"""

from collections.abc import Iterable
from typing import Final

from litestar import Response, get

from server.dependencies import Engine
from server.errors import documented
from shared.protocol import Snapshot

_CONTENT_TYPE: Final = "text/plain; version=0.0.4"
_STATES: Final = ("absent", "loading", "resident", "offloaded", "unavailable")


@get(
    "/metrics",
    operation_id="getMetrics",
    summary="Figures for Prometheus",
    tags=["Service"],
    media_type="text/plain",
    responses=documented(401, 403, 500),
)
async def metrics(engine: Engine) -> Response[str]:
    """Requests, queue, models and memory; `tts_worker_up` alone while there is no worker."""
    snapshot = engine.snapshot if engine.trouble() is None else None
    lines = _lines("tts_worker_up", "gauge", "Whether the GPU worker answers.", [("", int(snapshot is not None))])
    lines += _lines(
        "tts_worker_restarts_total", "counter", "Other workers that this web worker met.", [("", engine.restarts)]
    )
    if snapshot is not None:
        lines += _of(snapshot)
    return Response("\n".join(lines) + "\n", media_type=_CONTENT_TYPE)


def _of(snapshot: Snapshot) -> list[str]:
    requests, device, host = snapshot.requests, snapshot.device, snapshot.host
    outcomes = [
        (f'{{outcome="{name}"}}', getattr(requests, name)) for name in ("finished", "failed", "cancelled", "rejected")
    ]
    memory = [
        (f'{{kind="{kind}"}}', getattr(device, f"{kind}_bytes"))
        for kind in ("total", "used", "free", "ours", "others", "budget")
    ]
    held = [
        (f'{{model="{model.id}",purpose="{purpose}"}}', size)
        for model in snapshot.models
        for purpose, size in model.bytes.items()
    ]
    states = [
        (f'{{model="{model.id}",state="{state}"}}', int(model.state == state))
        for model in snapshot.models
        for state in _STATES
    ]
    return [
        *_lines("tts_worker_uptime_seconds", "gauge", "How long the GPU worker lives.", [("", snapshot.uptime_s)]),
        *_lines("tts_requests_started_total", "counter", "Requests that got a slot.", [("", requests.started)]),
        *_lines("tts_requests_total", "counter", "Requests that are over, by outcome.", outcomes),
        *_lines("tts_requests_running", "gauge", "Requests that hold a slot.", [("", snapshot.running)]),
        *_lines("tts_requests_queued", "gauge", "Requests that wait for a slot.", [("", snapshot.queued)]),
        *_lines("tts_slots", "gauge", "Requests that can run at the same time.", [("", snapshot.slots)]),
        *_lines("tts_device_memory_bytes", "gauge", "The device's memory, as its driver tells it.", memory),
        *_lines("tts_host_offloaded_bytes", "gauge", "Weights that wait in RAM.", [("", host.offloaded_bytes)]),
        *_lines("tts_model_bytes", "gauge", "What a model holds on the device, by purpose.", held),
        *_lines("tts_model_state", "gauge", "1 for the state that a model is in.", states),
    ]


def _lines(name: str, kind: str, said: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    return [f"# HELP {name} {said}", f"# TYPE {name} {kind}", *(f"{name}{labels} {value}" for labels, value in samples)]
