"""/, /health, /ready: what this service is, whether it runs, whether it can speak."""

import time
from typing import Any

from litestar import Request, Response, get

from server.audio import MAX_REFERENCE_BYTES
from server.dependencies import EngineDependency, SettingsDependency
from server.http.auth import keyring_of
from server.http.errors import ApiError, documented
from server.http.forwarded import client_view
from server.routes.web_page import page_response, wants_page
from server.schemas import Health, Limits, Ready, Requires, Root
from server.version import VERSION
from shared.recordings import MAX_RECORDING_S, MIN_RECORDING_S


@get("/", operation_id="getRoot", summary="Get the service's name and version", tags=["Service"])
async def root(request: Request[Any, Any, Any], settings: SettingsDependency) -> Root | Response[bytes]:
    """Name, version and the most important paths; browsers get a page (TTS_WEB_PAGE)."""
    if settings.web_page and wants_page(request):
        return page_response(request, settings)
    prefix = client_view(settings, request.scope).prefix
    return Root(
        status="healthy",
        service=settings.api_title,
        version=VERSION,
        docs=f"{prefix}/docs",
        endpoints={
            "speech": f"{prefix}/v1/audio/speech",
            "models": f"{prefix}/v1/audio/models",
            "voices": f"{prefix}/v1/audio/voices",
        },
        limits=Limits(
            input_chars=settings.max_input_chars,
            recording_bytes=MAX_REFERENCE_BYTES,
            recording_min_s=MIN_RECORDING_S,
            recording_max_s=MAX_RECORDING_S,
        ),
        requires=Requires(
            key=keyring_of(request).guards_speech,
            admin_key=keyring_of(request).guards_admin,
            consent=settings.require_consent,
        ),
    )


@get("/health", operation_id="getHealth", summary="Is this web process running?", tags=["Service"])
async def health() -> Health:
    """200 as long as this process can answer; it says nothing about the GPU worker."""
    return Health(status="healthy", timestamp=time.time())


@get(
    "/ready",
    operation_id="getReady",
    summary="Is the service ready to speak?",
    tags=["Service"],
    responses=documented(500, 503),
)
async def ready(engine: EngineDependency) -> Ready:
    """200 while the GPU worker answers and the default model can be served; else 503 with the reason.

    A cluster that has scaled to zero is ready: the next request starts a GPU worker.
    """
    error, snapshot = engine.unavailable(), engine.snapshot
    if error is not None or snapshot is None:
        raise error or ApiError("worker_unavailable", "The GPU worker has sent no report yet.")
    if not snapshot.accepting:
        raise ApiError("shutting_down", "The GPU worker is shutting down.")
    default = next((model for model in snapshot.models if model.id == snapshot.default_model), None)
    if default is None:
        raise ApiError("model_unavailable", f"The default model {snapshot.default_model} is unknown.")
    if default.id in snapshot.preloading:
        raise ApiError("model_unavailable", f"The default model {default.id} is loading. {default.detail}".strip())
    if default.state == "unavailable" or (default.state != "resident" and default.detail):
        # An absent or offloaded model is loaded by its next request, unless `detail` says why its last load failed.
        detail = default.detail.rstrip(".")
        raise ApiError("model_unavailable", f"The default model {default.id} cannot be served now: {detail}.")
    return Ready(status="ready", model=snapshot.default_model, worker=snapshot.boot_id)
