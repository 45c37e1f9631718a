"""Version 1 of the API: OpenAI's routes, and our own beside them.

ElevenLabs' routes show how another version stands beside this one: modules of its own read its requests and write its
answers, and they speak through what all versions share in server/routes.
"""

from typing import Any

from litestar import Router

from server.http.auth import require_key
from server.routes.v1 import (
    models,
    nari_websocket,
    new_voices,
    probes,
    speech,
    speech_batch,
    speech_outcome,
    speech_websocket,
    stored_audio,
    voice_consents,
    voice_files,
    voices,
)


def handlers() -> list[Any]:
    """The handlers for the application."""
    guarded = Router(
        "/v1",
        guards=[require_key],
        route_handlers=[
            *(probes.test, probes.readyz),
            *(models.list_models, models.list_audio_models, models.get_model, models.get_audio_model),
            Router(
                "/audio",
                route_handlers=[
                    speech.create_speech,
                    speech_batch.create_speech_batch,
                    speech_outcome.get_speech,
                    *(voices.list_voices, new_voices.create_voice),
                    *(voices.get_voice, voices.update_voice, voices.delete_voice),
                    *(voice_files.export_voice, voice_files.import_voice),
                    *(voice_consents.create_consent, voice_consents.list_consents, voice_consents.get_consent),
                    *(voice_consents.update_consent, voice_consents.delete_consent),
                ],
            ),
        ],
    )
    # A WebSocket's key may come in its first message, so it looks at keys and origins itself.
    # The id of stored audio is its key.
    return [guarded, speech_websocket.stream_speech, nari_websocket.speak_nari, stored_audio.get_stored_audio]
