"""LiveKit's and Pipecat's plugins, and wyoming-openai's server: all of a text is heard, or an error is seen."""

import os

import numpy as np
import pytest
import soxr

from shared.pcm import SAMPLE_RATE
from tests.clients.conftest import Heard, Speak
from tests.recogniser import SENTENCES, recognise
from tests.system.service import Service

pytestmark = pytest.mark.clients

LONG = "The old clock struck midnight. " * 130
"""The GPU worker of a small model needs seconds for it."""


AGENTS_OF_ELEVENLABS = [("livekit_elevenlabs", "eleven_turbo_v2_5"), ("pipecat_elevenlabs", "eleven_turbo_v2_5")]
"""Agents whose words go through ElevenLabs' WebSocket."""

CLIENTS = pytest.mark.parametrize(
    ("client", "model"),
    [
        ("livekit", "tts-1"),
        ("livekit", "gpt-4o-mini-tts"),
        ("pipecat", "gpt-4o-mini-tts"),
        ("wyoming", "tts-1"),
        *AGENTS_OF_ELEVENLABS,
    ],
)
"""LiveKit asks for events unless the model is tts-1 or tts-1-hd."""


def words(heard: Heard, sentences: int = 1) -> str | None:
    """The sentences that are heard."""
    sound = soxr.resample(np.frombuffer(heard.pcm, "<i2"), heard.rate, SAMPLE_RATE)
    return recognise(sound.tobytes(), sentences)


@CLIENTS
def test_a_sentence_is_spoken_whole(espeak: Service, speak: Speak, client: str, model: str) -> None:
    """Its words are heard, with no error."""
    heard = speak(client, espeak, SENTENCES[0], model=model).result()
    assert (words(heard), heard.error) == (SENTENCES[0], "")


@CLIENTS
def test_a_killed_worker_is_an_error(qwen: Service, speak: Speak, client: str, model: str) -> None:
    """The GPU worker dies while the client listens: the client sees an error, and takes no part for the whole."""
    speaking = speak(client, qwen, LONG, model=model)
    speaking.wait_for_audio()
    os.kill(qwen.worker_pid(), 9)
    heard = speaking.result()
    assert heard.pcm
    assert heard.error


@pytest.mark.parametrize("form", ["whole", "streamed"])
def test_wyoming_openai_speaks_past_a_line(espeak: Service, speak: Speak, form: str) -> None:
    """A `---` between two sentences costs neither of them, sent whole or as it is written."""
    heard = speak("wyoming", espeak, f"{SENTENCES[0]}\n\n---\n\n{SENTENCES[1]}", form).result()
    assert (words(heard, 2), heard.error) == (f"{SENTENCES[0]} {SENTENCES[1]}", "")


@pytest.mark.parametrize("service", ["espeak", "qwen"])
def test_wyoming_openai_lists_each_voice_once(request: pytest.FixtureRequest, speak: Speak, service: str) -> None:
    """It offers each voice that the service lists once, and no voice that is then refused."""
    running: Service = request.getfixturevalue(service)
    voices = speak("wyoming", running, "Hello.").result().voices
    listed = running.http.get("/v1/audio/voices?model=tts-1").json()["voices"]
    assert voices == [voice["id"] for voice in listed]
    assert len(set(voices)) == len(voices) > 13
    said = [running.speech("…", model="tts-1", voice=voice).status_code for voice in voices]
    assert set(said) == {200}
