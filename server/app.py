"""create_app: the only place where the web side's parts are put together."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from litestar import Litestar, Router
from litestar.datastructures import State

from server.audio import DecoderPool
from server.dependencies import dependencies
from server.engine import ZmqEngineClient
from server.http.auth import require_admin, require_key
from server.http.errors import exception_handlers
from server.http.middleware import Edge
from server.http.origins import cors_config
from server.http.request_ids import put_request_id
from server.routes import admin, docs, health, metrics, models, speech, voices
from shared.log import set_up_logging
from shared.settings import Settings, load_settings


def create_app(settings: Settings) -> Litestar:
    """The web application. ValueError where `settings` do not say where the GPU worker is (`worker_url`).

    A GPU worker that is not there makes the application not ready; it never keeps it from starting.
    """
    if settings.worker_url is None:
        raise ValueError("worker_url is not set: the web side does not start a GPU worker by itself")
    url = settings.worker_url

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        # Here and not earlier: granian forks, and neither sockets nor an event loop survive that.
        async with ZmqEngineClient(url, settings.worker_token) as engine:
            app.state.engine = engine
            app.state.recordings = DecoderPool(allow_urls=settings.allow_ref_urls)
            yield

    cors = cors_config(settings)
    app = Litestar(
        route_handlers=[
            *(health.root, health.health, health.ready),
            *(docs.openapi_json, docs.redoc, docs.static_file),
            *_guarded(settings),
        ],
        dependencies=dependencies(),
        state=State({"settings": settings}),
        lifespan=[lifespan],
        exception_handlers=exception_handlers(),
        before_send=[put_request_id],
        request_max_body_size=settings.max_body_mb * 1024 * 1024,
        cors_config=cors,
        openapi_config=docs.openapi_config(settings.api_title),
        logging_config=None,
    )
    # Around what Litestar does by itself, its routing and CORS included, which no middleware of its own is.
    app.asgi_handler = Edge(app.asgi_handler, cors)
    return app


def _guarded(settings: Settings) -> list[Router]:
    """What needs a key where keys are configured."""
    v1 = Router(
        "/v1",
        guards=[require_key(settings)],
        route_handlers=[
            *(health.test, health.readyz),
            *(models.list_models, models.list_audio_models, models.get_model, models.get_audio_model),
            Router(
                "/audio",
                route_handlers=[
                    speech.create_speech,
                    *(voices.list_voices, voices.create_voice, voices.get_voice, voices.delete_voice),
                ],
            ),
        ],
    )
    administration = Router(
        "/admin",
        guards=[require_admin(settings)],
        route_handlers=[
            *(admin.config, admin.stats, admin.vram, admin.cleanup),
            *(admin.move_model, admin.move_model_of_hub),
        ],
    )
    figures = Router("/", guards=[require_key(settings)], route_handlers=[metrics.metrics])
    return [v1, administration, figures]


def from_environment() -> Litestar:
    """The web application as the TTS_* variables describe it: what granian loads in each web worker."""
    settings = load_settings(os.environ)
    set_up_logging(settings.log_level, settings.log_format, "web")
    return create_app(settings)
