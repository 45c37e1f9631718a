"""The recogniser itself: it recognises each sentence, and nothing in other sounds."""

import numpy as np
import pytest

from gpu_worker.engines.base import Job, Pcm
from gpu_worker.engines.espeak import EspeakEngine
from shared.catalog import load_catalog
from shared.protocol import Segment
from tests.recogniser import SENTENCES, recognise

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def spoken() -> dict[str, bytes]:
    """Every sentence, spoken by espeak-ng."""
    engine = EspeakEngine(next(spec for spec in load_catalog() if spec.engine == "espeak"))
    sounds = {}
    for sentence in SENTENCES:
        engine.admit(Job(id="a", task="CustomVoice", segments=[Segment(text=sentence)], voice="en-us+f2"))
        events = []
        while engine.runnable(()):
            events += engine.step(())
        sounds[sentence] = b"".join(event.data for event in events if isinstance(event, Pcm))
    return sounds


def test_each_sentence_is_recognised(spoken: dict[str, bytes]) -> None:
    """Each of the twenty gives its own words."""
    assert [recognise(pcm) for pcm in spoken.values()] == list(SENTENCES)


def test_pairs_are_recognised(spoken: dict[str, bytes]) -> None:
    """Two sentences in a row are recognised in their order."""
    pair = spoken[SENTENCES[3]] + spoken[SENTENCES[11]]
    assert recognise(pair, sentences=2) == f"{SENTENCES[3]} {SENTENCES[11]}"


def test_other_sounds_are_not_recognised(spoken: dict[str, bytes]) -> None:
    """Noise, silence, half a sentence and a reversed sentence are none of the twenty."""
    sentence = SENTENCES[0]
    noise = np.random.default_rng(0).integers(-3000, 3000, 48_000).astype("<i2").tobytes()
    backwards = np.frombuffer(spoken[sentence], "<i2")[::-1].tobytes()
    half = spoken[sentence][: len(spoken[sentence]) // 4 * 2]
    assert [recognise(pcm) for pcm in (noise, bytes(48_000), half, backwards)] == [None] * 4
