"""Sample arithmetic of the one PCM layout between the processes: 24 kHz, mono, int16 little-endian."""

from typing import Final

SAMPLE_RATE: Final = 24_000
"""Samples a second."""

BYTES_PER_SAMPLE: Final = 2

FRAME_SAMPLES: Final = 1_920
"""Samples of one Qwen3-TTS frame: 80 ms, 12.5 frames a second."""

SILENCE_PIECE_S: Final = 0.64
"""The longest piece of `silence`."""

EMPTY_S: Final = 0.1
"""The silence for a text without anything speakable: the shortest that players open in every format."""


def samples_of(data: bytes | memoryview) -> int:
    """The number of samples in `data`; ValueError if it ends inside a sample."""
    samples, rest = divmod(len(data), BYTES_PER_SAMPLE)
    if rest:
        raise ValueError(f"{len(data)} bytes of 16-bit PCM end inside a sample")
    return samples


def seconds_of(data: bytes | memoryview) -> float:
    """The duration of `data`."""
    return samples_of(data) / SAMPLE_RATE


def bytes_for(seconds: float) -> int:
    """The number of bytes of `seconds` of sound, rounded to a whole sample."""
    return round(seconds * SAMPLE_RATE) * BYTES_PER_SAMPLE


def silence(seconds: float) -> list[bytes]:
    """So much silence in pieces, whose whole ones are one object."""
    piece = bytes(bytes_for(SILENCE_PIECE_S))
    whole, rest = divmod(bytes_for(seconds), len(piece))
    return [piece] * whole + [piece[:rest]] * bool(rest)
