"""What handlers ask for by name: the engine client, the settings and the decoding of recordings, provided by app.py."""

from typing import Any

from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.params import SkipValidation

from server.audio import DecoderPool
from server.engine import EngineClient
from shared.settings import Settings

Engine = NamedDependency[SkipValidation[EngineClient]]
ServerSettings = NamedDependency[SkipValidation[Settings]]
RecordingDecoder = NamedDependency[SkipValidation[DecoderPool]]


def _engine(state: State) -> Any:
    return state.engine


def _settings(state: State) -> Any:
    return state.settings


def _recordings(state: State) -> Any:
    return state.recordings


def dependencies() -> dict[str, Provide]:
    """The providers; `state` holds what app.py put there."""
    return {
        "engine": Provide(_engine, sync_to_thread=False),
        "settings": Provide(_settings, sync_to_thread=False),
        "recordings": Provide(_recordings, sync_to_thread=False),
    }
