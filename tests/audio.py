"""Audio for tests: a decoder that shares only FFmpeg with the server's encoder, and simple sounds.

PCM is 24 kHz mono int16 little-endian, as bytes.
"""

import array
import io
import math
import wave

import av
import numpy as np
from numpy.typing import NDArray

from shared.pcm import SAMPLE_RATE

Samples = NDArray[np.float64]


def decode(data: bytes, audio_format: str | None = None) -> bytes:
    """The audio in `data`; `audio_format` names the container that a player knows from the Content-Type."""
    if audio_format == "pcm":
        return data
    demuxer = {"opus": "ogg", "aac": "aac"}.get(audio_format or "", audio_format)
    return _decoded(io.BytesIO(data), demuxer, SAMPLE_RATE)


def tone(seconds: float, *, hertz: float = 300.0, amplitude: float = 9_000.0, fade_s: float = 0.25) -> bytes:
    """A sine that fades out, as speech does."""
    count = round(seconds * SAMPLE_RATE)
    fade = max(1, round(fade_s * SAMPLE_RATE))
    times = np.arange(count)
    levels = amplitude * np.minimum(1.0, (count - times) / fade) ** 2
    return np.rint(levels * np.sin(2 * math.pi * hertz * times / SAMPLE_RATE)).astype("<i2").tobytes()


def wav(pcm: bytes) -> bytes:
    """`pcm` as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        out.writeframes(pcm)
    return file.getvalue()


def peak(pcm: bytes) -> int:
    """The largest absolute value of a sample."""
    return max((abs(sample) for sample in array.array("h", pcm)), default=0)


def waveform(pcm: bytes) -> Samples:
    """`pcm` as numbers."""
    return np.frombuffer(pcm, "<i2").astype(np.float64)


def likeness(heard: Samples, wanted: Samples, shift: int = 1_920) -> float:
    """Normalised correlation of the beginning of `heard` with `wanted`, at the best shift of up to `shift` samples."""
    got = heard[: wanted.size + shift]
    sums = np.concatenate(([0.0], np.cumsum(got**2)))
    energy = (sums[wanted.size :] - sums[: -wanted.size]) * (wanted**2).sum()
    spectrum = np.fft.rfft(got) * np.conj(np.fft.rfft(wanted, got.size))
    correlation = np.fft.irfft(spectrum, got.size)[: got.size - wanted.size + 1]  # the shifts that do not wrap around
    return float((correlation / np.sqrt(energy + 1e-9)).max())


def _decoded(file: io.BytesIO, demuxer: str | None, rate: int) -> bytes:
    pieces = []
    with av.open(file, "r", format=demuxer) as container:
        resampler = av.AudioResampler("s16", "mono", rate)
        for frame in container.decode(audio=0):
            pieces += [bytes(piece.planes[0])[: piece.samples * 2] for piece in resampler.resample(frame)]
        pieces += [bytes(piece.planes[0])[: piece.samples * 2] for piece in resampler.resample(None)]
    return b"".join(pieces)


def tags_of(audio: bytes) -> dict[str, str]:
    """Those of the file and of its stream, as FFmpeg reads them, without the name of the program."""
    with av.open(io.BytesIO(audio)) as container:
        found = {**container.metadata, **container.streams.audio[0].metadata}
    return {name.lower(): text for name, text in found.items() if name.lower() != "encoder"}
