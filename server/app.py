"""create_app: the only place where the parts of the web side are put together."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from litestar import Litestar, Router
from litestar.datastructures import State
from litestar.di import Provide

from server.audio import AudioStore, DecoderPool
from server.caches import WebCaches
from server.dependencies import providers
from server.engine import EngineClient, WebProcess, ZmqEngineClient
from server.http.auth import require_admin, require_key
from server.http.error_handlers import exception_handlers
from server.http.keys import load_keyring
from server.http.middleware import HttpMiddleware
from server.http.open_sockets import OpenSockets
from server.http.origins import cors_config
from server.reload import AskReload, WebState, no_main_process
from server.routes import (
    admin,
    asyncapi,
    caches,
    captioned_speech,
    docs,
    elevenlabs,
    elevenlabs_websocket,
    events,
    health,
    metrics,
    performance,
    reload,
    usage,
    v1,
    web_page,
)
from server.routes.speech_start import speech_starter
from server.text import load_pronunciations
from shared.log import set_up_logging
from shared.protocol import LimitName
from shared.redaction import keep_secret
from shared.settings import Settings
from shared.trace_settings import open_traces

OpenEngine = Callable[[WebProcess], AbstractAsyncContextManager[EngineClient]]
"""Opens the client of the GPU workers for a web process."""


def create_app(
    settings: Settings,
    open_engine: OpenEngine | None = None,
    *,
    state: WebState | None = None,
    ask_reload: AskReload = no_main_process,
) -> HttpMiddleware:
    """The web application: the middleware with the Litestar application in it (`app`).

    Without `open_engine` the engine is the GPU worker at `worker_url`; ValueError without that.
    Without a GPU worker the application starts and is not ready.
    PronunciationsError if the file of pronunciations cannot be used.
    `state` is that of the main process; without it, the keys are read here, which may raise KeysError.
    """
    open_engine = open_engine or _engine_of(settings)
    web_state = state or WebState(settings=settings, keyring=load_keyring(settings))
    keep_secret(settings.secrets())
    load_pronunciations(settings.pronunciations)
    open_sockets = OpenSockets()
    limit_hits: Counter[LimitName] = Counter()

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        # Not before the application starts: sockets and an event loop do not survive granian's fork.
        audio_store = AudioStore(
            settings.audio_store_dir,
            max_bytes=settings.audio_store_mb * 1024 * 1024,
            ttl_s=settings.audio_store_ttl_s,
        )
        web_caches = WebCaches(settings.pronunciations, audio_store)
        web_process = WebProcess(
            cache_counts=web_caches.counts,
            open_sockets=lambda: open_sockets.count,
            limit_hits=limit_hits,
            on_emptied=web_caches.on_emptied,
        )
        traces = app.state.traces = open_traces(settings, os.environ, "web")
        async with (
            audio_store,
            open_engine(web_process) as engine,
        ):
            await engine.use_variables(web_state.worker_variables)
            app.state.engine = engine
            app.state.audio_store = audio_store
            app.state.caches = web_caches
            app.state.decoder_pool = DecoderPool(allow_urls=settings.allow_ref_urls, limit_hits=limit_hits)
            app.state.event_feed = events.EventFeed(
                lambda: events.event_of(engine, app.state.settings), app.state.stopping, limit_hits=limit_hits
            )
            yield
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = Litestar(
        route_handlers=[
            *(health.root, health.health, health.ready),
            *(docs.openapi_json, asyncapi.asyncapi_json, docs.redoc, docs.static_file),
            *([web_page.page_file] if settings.web_page else []),
            # Their keys may come in a first message, so they look at keys and origins themselves.
            *(elevenlabs_websocket.stream_input, elevenlabs_websocket.multi_stream_input),
            *v1.handlers(),
            *_guarded(),
        ],
        dependencies={**providers(), "starter": Provide(speech_starter, sync_to_thread=False)},
        state=State(
            {
                "settings": settings,
                "keyring": web_state.keyring,
                "ask_reload": ask_reload,
                "stopping": asyncio.Event(),
                "open_sockets": open_sockets,
                "limit_hits": limit_hits,
                "traces": None,
            }
        ),
        lifespan=[lifespan],
        exception_handlers=exception_handlers(),
        request_max_body_size=settings.max_body_mb * 1024 * 1024,
        cors_config=cors_config(settings),
        openapi_config=docs.openapi_config(settings.api_title),
        logging_config=None,
    )
    # Around the whole application: Litestar's own middleware sees neither its routing errors nor its CORS answers.
    return HttpMiddleware(app)


def _engine_of(settings: Settings) -> OpenEngine:
    if settings.worker_url is None:
        raise ValueError("worker_url is not set: the web side does not start a GPU worker by itself")
    url, token, timeout_s = settings.worker_url, settings.worker_token, settings.worker_timeout_s
    return lambda web: ZmqEngineClient(url, token, timeout_s=timeout_s, web=web)


def _guarded() -> list[Router]:
    """The routes that need a key if keys are configured."""
    others = Router(
        "/",
        guards=[require_key],
        route_handlers=[
            captioned_speech.create_captioned_speech,
            *(elevenlabs.convert, elevenlabs.stream),
            *(elevenlabs.list_voices, elevenlabs.list_voices_2, elevenlabs.get_voice),
        ],
    )
    administration = Router(
        "/admin",
        guards=[require_admin],
        route_handlers=[
            *(admin.config, admin.stats, admin.vram, admin.cleanup),
            *(admin.move_model, admin.move_model_of_hub),
            *(performance.performance, events.events, usage.get_usage),
            *(caches.get_caches, caches.empty_cache, reload.reload_settings),
        ],
    )
    figures = Router("/", guards=[require_key], route_handlers=[metrics.metrics])
    return [others, administration, figures]


def web_application(state: WebState, ask_reload: AskReload) -> HttpMiddleware:
    """The application of a web worker, with its logging."""
    set_up_logging(state.settings.log_level, state.settings.log_format, "web")
    return create_app(state.settings, state=state, ask_reload=ask_reload)
