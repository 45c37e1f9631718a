"""A speech recogniser for tests, with a closed grammar of twenty sentences: pocketsphinx.

It misses small dropouts: tests compare sample counts as well.
"""

import functools
from typing import Any, Final

import numpy as np
import pocketsphinx
import soxr

from shared.pcm import SAMPLE_RATE

RATE: Final = 16_000
"""The sample rate of pocketsphinx's acoustic model, in Hz."""

SENTENCES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "Please bring me a large glass of cold water.",
    "My brother bought a new car last summer.",
    "The train to the city leaves at seven in the morning.",
    "She opened the window and looked at the garden.",
    "Every child in the school can sing this song.",
    "We walked along the river until it was dark.",
    "The doctor said that he should stay in bed.",
    "Nobody knows the answer to that question.",
    "They built a small house near the mountain.",
    "Could you tell me the way to the station?",
    "The red apples on the table are for your mother.",
    "He has read this book more than three times.",
    "A strong wind was blowing from the north all night.",
    "Our teacher writes the words on the board.",
    "I would like to buy two tickets for tomorrow.",
    "The old man told us stories about the sea.",
    "It is raining again and I forgot my umbrella.",
    "Most people like to sleep late on Sunday.",
    "The computer is much faster than the old machine.",
)


def recognise(pcm: bytes, sentences: int = 1) -> str | None:
    """The words of `pcm` (24 kHz mono int16), or None if they are not exactly so many of SENTENCES."""
    decoder = _decoder(sentences)
    sound = soxr.resample(np.frombuffer(pcm, dtype="<i2"), SAMPLE_RATE, RATE)
    decoder.start_utt()
    decoder.process_raw(sound.astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    heard = decoder.hyp()
    if heard is None:
        return None
    words = heard.hypstr.strip()
    found = []
    for _ in range(sentences):
        said = [sentence for sentence in SENTENCES if words.startswith(_words(sentence))]
        if not said:
            return None
        found.append(said[0])
        words = words.removeprefix(_words(said[0])).strip()
    return " ".join(found) if not words else None


def _words(sentence: str) -> str:
    return "".join(letter for letter in sentence.lower() if letter.isalpha() or letter == " ")


@functools.cache
def _decoder(sentences: int) -> Any:
    decoder = pocketsphinx.Decoder(lm=None, loglevel="FATAL", samprate=RATE)
    grammar = " | ".join(_words(sentence) for sentence in SENTENCES)
    decoder.add_jsgf_string(
        "sentences", f"#JSGF V1.0; grammar sentences; public <said> = {' '.join([f'({grammar})'] * sentences)};"
    )
    decoder.activate_search("sentences")
    return decoder
