"""Another sample rate than the engine's: soxr, while streaming.

Only the encoder of an answer with another rate imports this module: soxr brings numpy, which takes 0.25 s and 10 MB.
"""

import numpy as np
import soxr

from shared.pcm import SAMPLE_RATE

_FULL_SCALE = 32_768


class Resampler:
    """Changes the sample rate of one stream of PCM.

    The result does not depend on the cuts: soxr computes in floating point. Its own rounding to int16 adds a dither
    that depends on them. Of n samples come n · rate / 24,000, rounded; up to 25 ms of them come later.
    """

    def __init__(self, rate: int) -> None:
        self._stream = soxr.ResampleStream(SAMPLE_RATE, rate, 1, dtype="float32")

    def feed(self, pcm: bytes) -> bytes:
        """Take whole samples; returns those that are ready."""
        return self._resample(pcm, last=False)

    def finish(self) -> bytes:
        """The rest of the samples."""
        return self._resample(b"", last=True)

    def _resample(self, pcm: bytes, *, last: bool) -> bytes:
        samples = self._stream.resample_chunk(np.frombuffer(pcm, "<i2").astype(np.float32), last=last)
        return bytes(np.rint(samples).clip(-_FULL_SCALE, _FULL_SCALE - 1).astype("<i2").tobytes())
