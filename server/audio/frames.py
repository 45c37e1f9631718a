"""PCM as FFmpeg's audio frames."""

from av.audio.frame import AudioFrame

from shared.pcm import SAMPLE_RATE, samples_of


def audio_frame(pcm: bytes, position: int, rate: int = SAMPLE_RATE) -> AudioFrame:
    """A frame of mono int16 PCM with that sample rate; `position` is the number of samples before it."""
    frame = AudioFrame(format="s16", layout="mono", samples=samples_of(pcm), align=1)
    frame.planes[0].update(pcm)
    frame.sample_rate = rate
    frame.pts = position
    return frame
