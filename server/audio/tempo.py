"""The speed of speech: FFmpeg's atempo filter changes the duration and keeps the pitch."""

import math
from fractions import Fraction
from typing import Final, cast

import av
import av.filter
from av.audio.frame import AudioFrame

from server.audio.frames import audio_frame
from shared.pcm import BYTES_PER_SAMPLE, SAMPLE_RATE

MIN_SPEED: Final = 0.25
MAX_SPEED: Final = 4.0

_MIN_ATEMPO: Final = 0.5
"""The lowest factor of one atempo filter; below it, two filters run in a row."""

_INPUT_SAMPLES: Final = 960
"""Samples given to atempo at once. It keeps its output back until it has as much as one input makes."""


class Tempo:
    """Changes the duration of one stream of PCM by `speed`.

    The output of atempo is a few milliseconds off, so the last samples are cut or filled up to exactly `fed / speed`.
    """

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._graph = av.filter.Graph()
        source = self._graph.add_abuffer(
            sample_rate=SAMPLE_RATE, format="s16", layout="mono", time_base=Fraction(1, SAMPLE_RATE)
        )
        factors = [speed] if speed >= _MIN_ATEMPO else [math.sqrt(speed)] * 2
        filters = [self._graph.add("atempo", f"{factor:.9f}") for factor in factors]
        self._graph.link_nodes(source, *filters, self._graph.add("abuffersink")).configure()
        self._fed = 0
        self._returned = 0

    def feed(self, pcm: bytes) -> bytes:
        """Take PCM; returns the changed PCM that is ready."""
        step = _INPUT_SAMPLES * BYTES_PER_SAMPLE
        pieces = []
        for start in range(0, len(pcm), step):
            frame = audio_frame(pcm[start : start + step], self._fed)
            self._fed += frame.samples
            self._graph.push(frame)
            pieces.append(self._pull())
        return b"".join(pieces)

    def finish(self) -> bytes:
        """The rest of the changed PCM."""
        self._graph.push(None)
        last = self._pull()
        missing = self._due() - self._returned
        return last + bytes(max(missing, 0) * BYTES_PER_SAMPLE)

    def _due(self) -> int:
        return round(self._fed / self._speed)

    def _pull(self) -> bytes:
        pieces = []
        while True:
            try:
                frame = cast("AudioFrame", self._graph.pull())
            except (av.BlockingIOError, av.EOFError):
                break
            samples = min(frame.samples, self._due() - self._returned)
            pieces.append(bytes(frame.planes[0])[: samples * BYTES_PER_SAMPLE])
            self._returned += samples
        return b"".join(pieces)
