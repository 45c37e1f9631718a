"""Applies the state of a reload to a running application. Requests in progress keep the settings they began with."""

from litestar.datastructures import State

from server.audio import AudioStore, DecoderPool
from server.caches import WebCaches
from server.engine import EngineClient
from server.http.middleware import HttpMiddleware
from server.http.origins import set_cors
from server.reload.messages import WebState
from shared.log import set_log_level
from shared.redaction import keep_secret

_MIB = 1024 * 1024


async def take_state(application: HttpMiddleware, new: WebState) -> None:
    """Apply `new` to this process, then to the GPU worker. The application has started."""
    settings, state = new.settings, application.app.state
    keep_secret(settings.secrets())
    state.settings, state.keyring = settings, new.keyring
    set_log_level(settings.log_level)
    set_cors(application.app, settings)
    application.body_budget.budget_bytes = settings.body_buffer_mb * _MIB
    _take_parts(state, new)
    engine: EngineClient = state.engine
    await engine.use_variables(new.worker_variables)


def _take_parts(state: State, new: WebState) -> None:
    settings = new.settings
    audio_store: AudioStore = state.audio_store
    audio_store.limit(max_bytes=settings.audio_store_mb * _MIB, ttl_s=settings.audio_store_ttl_s)
    decoder_pool: DecoderPool = state.decoder_pool
    decoder_pool.allow_urls = settings.allow_ref_urls
    caches: WebCaches = state.caches
    caches.use_pronunciations(settings.pronunciations)
