"""What a player would have made of an answer: when it could begin, and where it ran dry. Computed after the load.

The player is the strictest there is: it begins with the first sample that it can decode, and buffers nothing first.
"""

from collections.abc import Iterable
from typing import Final

import av
import msgspec

from shared.pcm import SAMPLE_RATE

FORMATS: Final = ("pcm", "mp3")


class Playback(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as heard, in seconds; `first_playable_s` since the request was due."""

    first_byte_s: float
    first_playable_s: float
    audio_s: float
    stalls: int
    stall_s: float


def play(arrivals: list[tuple[float, bytes]], audio_format: str) -> Playback:
    """Decode an answer as it came, and play it; ValueError where there is nothing to hear."""
    decoder = _Pcm() if audio_format == "pcm" else _Mp3()
    heard = [(instant, decoder.samples(data)) for instant, data in arrivals]
    if heard:
        heard.append((heard[-1][0], decoder.rest()))
    first, audio_s, stalls, stall_s = listen((instant, samples / SAMPLE_RATE) for instant, samples in heard)
    return Playback(
        first_byte_s=arrivals[0][0], first_playable_s=first, audio_s=audio_s, stalls=stalls, stall_s=stall_s
    )


def listen(heard: Iterable[tuple[float, float]]) -> tuple[float, float, int, float]:
    """From (instant, seconds of audio that came then): first instant with sound, seconds in all, stalls, stalled."""
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
        raise ValueError("nothing to hear")
    return first, audio_s, stalls, stall_s


class _Pcm:
    """Samples in bytes cut anywhere."""

    _bytes = 0

    def samples(self, data: bytes) -> int:
        before = self._bytes // 2
        self._bytes += len(data)
        return self._bytes // 2 - before

    def rest(self) -> int:
        return 0


class _Mp3:
    """Samples that FFmpeg's decoder can give once these bytes are there."""

    def __init__(self) -> None:
        self._codec = av.CodecContext.create("mp3", "r")

    def samples(self, data: bytes) -> int:
        return sum(frame.samples for packet in self._codec.parse(data) for frame in self._codec.decode(packet))

    def rest(self) -> int:
        """What the parser held back, since only the next frame or the end tells that a frame is complete."""
        held = self._codec.parse(None)
        return sum(frame.samples for packet in held for frame in self._codec.decode(packet))
