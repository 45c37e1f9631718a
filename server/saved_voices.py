"""How a saved voice is found by what a client calls it, also one that another web worker made a moment ago."""

from typing import Final

from server.engine import EngineClient
from server.http.errors import ApiError
from shared.protocol import FindVoice, SavedVoice

_TIMEOUT_S: Final = 5.0


async def find_saved_voice(name: str, engine: EngineClient, client: str) -> SavedVoice | None:
    """The saved voice of that id or name (case aside), None where there is none; ApiError without a worker.

    The snapshot answers for nothing; only a voice that it does not hold costs a question to the worker.
    """
    wanted = name.casefold()
    for voice in engine.snapshot.voices if engine.snapshot else ():
        if wanted in (voice.id.casefold(), voice.name.casefold()):
            return voice
    try:
        return (await engine.call(FindVoice(name=name), client=client, timeout_s=_TIMEOUT_S)).voice
    except ApiError as error:
        if error.code == "voice_not_found":
            return None
        raise
