"""Plays an answer back after the load: when playback can begin, and where it underruns.

The player is the strictest possible: it begins with the first sample that it can decode, without a buffer.
"""

from collections.abc import Iterable
from typing import Final

import av
import msgspec

from shared.pcm import SAMPLE_RATE

FORMATS: Final = ("pcm", "mp3")


class Playback(msgspec.Struct, frozen=True, kw_only=True):
    """One answer's playback, in seconds; `first_byte_s` and `first_playable_s` count from when the request was due."""

    first_byte_s: float
    first_playable_s: float
    audio_s: float
    stalls: int
    stall_s: float


def play(arrivals: list[tuple[float, bytes]], audio_format: str) -> Playback:
    """Decode an answer piece by piece, and play it. ValueError if it has no audio."""
    decoder = _Pcm() if audio_format == "pcm" else _Mp3()
    heard = [(instant, decoder.samples(data)) for instant, data in arrivals]
    if heard:
        heard.append((heard[-1][0], decoder.rest()))
    first, audio_s, stalls, stall_s = listen((instant, samples / SAMPLE_RATE) for instant, samples in heard)
    return Playback(
        first_byte_s=arrivals[0][0], first_playable_s=first, audio_s=audio_s, stalls=stalls, stall_s=stall_s
    )


def listen(heard: Iterable[tuple[float, float]]) -> tuple[float, float, int, float]:
    """From (instant, seconds of audio) pairs: first instant with audio, seconds of audio, stalls, stalled seconds."""
    first: float | None = None
    dry = audio_s = stall_s = 0.0
    stalls = 0
    for instant, seconds in heard:
        if not seconds:
            continue
        if first is None:
            first = dry = instant
        if instant > dry:
            stalls += 1
            stall_s += instant - dry
            dry = instant
        dry += seconds
        audio_s += seconds
    if first is None:
        raise ValueError("no audio")
    return first, audio_s, stalls, stall_s


class _Pcm:
    """Counts samples in pieces of any length."""

    _bytes = 0

    def samples(self, data: bytes) -> int:
        before = self._bytes // 2
        self._bytes += len(data)
        return self._bytes // 2 - before

    def rest(self) -> int:
        return 0


class _Mp3:
    """Counts the samples that FFmpeg's decoder returns for each piece."""

    def __init__(self) -> None:
        self._codec = av.CodecContext.create("mp3", "r")

    def samples(self, data: bytes) -> int:
        return sum(frame.samples for packet in self._codec.parse(data) for frame in self._codec.decode(packet))

    def rest(self) -> int:
        """The samples of the last frame: the parser returns a frame when it sees the next one or the end."""
        held = self._codec.parse(None)
        return sum(frame.samples for packet in held for frame in self._codec.decode(packet))
