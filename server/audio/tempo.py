"""The speed of speech: FFmpeg's atempo filter changes the duration and keeps the pitch."""

import array
import math
from fractions import Fraction
from typing import Final, cast

import av
import av.filter
from av.audio.frame import AudioFrame

from server.audio.frames import audio_frame
from shared.pcm import BYTES_PER_SAMPLE, SAMPLE_RATE, samples_of

MIN_SPEED: Final = 0.25
MAX_SPEED: Final = 4.0

_MIN_ATEMPO: Final = 0.5
"""The lowest factor of one atempo filter; below it, two filters run in a row."""

_INPUT_BYTES: Final = 960 * BYTES_PER_SAMPLE
"""PCM given to atempo at once. It keeps its output back until it has as much as one input makes."""

_FADE_SAMPLES: Final = 120


class Tempo:
    """Changes the duration of one stream of PCM by `speed`.

    The output of atempo is a few milliseconds off, so the last samples are cut or filled up to exactly `fed / speed`.
    The last 5 ms are faded out, because the cut may go through a loud wave.
    The output does not depend on how the PCM is cut.
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
        self._waiting = b""
        self._pulled = 0
        self._tail = b""

    def feed(self, pcm: bytes) -> bytes:
        """Take PCM; returns the changed PCM that is ready."""
        data = self._waiting + pcm
        whole = len(data) - len(data) % _INPUT_BYTES
        self._waiting = data[whole:]
        pushed = [self._push(data[start : start + _INPUT_BYTES]) for start in range(0, whole, _INPUT_BYTES)]
        changed = b"".join([self._tail, *pushed])
        ready = max(len(changed) - _FADE_SAMPLES * BYTES_PER_SAMPLE, 0)
        self._tail = changed[ready:]
        return changed[:ready]

    def finish(self) -> bytes:
        """The rest of the changed PCM."""
        last = self._tail
        # atempo makes no sample of a single one at a speed above 2, and fails.
        if len(self._waiting) > BYTES_PER_SAMPLE:
            last += self._push(self._waiting)
        else:
            self._fed += samples_of(self._waiting)
        self._graph.push(None)
        last = _faded_out(last + self._pull())
        missing = self._due() - self._pulled
        return last + bytes(max(missing, 0) * BYTES_PER_SAMPLE)

    def _due(self) -> int:
        return round(self._fed / self._speed)

    def _push(self, pcm: bytes) -> bytes:
        frame = audio_frame(pcm, self._fed)
        self._fed += frame.samples
        self._graph.push(frame)
        return self._pull()

    def _pull(self) -> bytes:
        pieces = []
        while True:
            try:
                frame = cast("AudioFrame", self._graph.pull())
            except (av.BlockingIOError, av.EOFError):
                break
            samples = min(frame.samples, self._due() - self._pulled)
            pieces.append(bytes(frame.planes[0])[: samples * BYTES_PER_SAMPLE])
            self._pulled += samples
        return b"".join(pieces)


def _faded_out(pcm: bytes) -> bytes:
    samples = array.array("h", pcm)
    fade = min(_FADE_SAMPLES, len(samples))
    for back in range(fade):
        samples[-1 - back] = round(samples[-1 - back] * math.sin(math.pi / 2 * (back + 0.5) / fade) ** 2)
    return samples.tobytes()
