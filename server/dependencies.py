"""The dependencies that route handlers name in their parameters; app.py puts the objects into the application's state.

Each alias below is the annotation of the parameter `engine`, `settings`, `decoder_pool` or `audio_store`.
"""

from typing import Any

from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.params import SkipValidation

from server.audio import AudioStore, DecoderPool
from server.engine import EngineClient
from shared.settings import Settings

EngineDependency = NamedDependency[SkipValidation[EngineClient]]
SettingsDependency = NamedDependency[SkipValidation[Settings]]
DecoderPoolDependency = NamedDependency[SkipValidation[DecoderPool]]
AudioStoreDependency = NamedDependency[SkipValidation[AudioStore]]


def _engine(state: State) -> Any:
    return state.engine


def _settings(state: State) -> Any:
    return state.settings


def _decoder_pool(state: State) -> Any:
    return state.decoder_pool


def _audio_store(state: State) -> Any:
    return state.audio_store


def providers() -> dict[str, Provide]:
    """Litestar's providers, by the name of the parameter."""
    return {
        "engine": Provide(_engine, sync_to_thread=False),
        "settings": Provide(_settings, sync_to_thread=False),
        "decoder_pool": Provide(_decoder_pool, sync_to_thread=False),
        "audio_store": Provide(_audio_store, sync_to_thread=False),
    }
