"""The audio of one answer: PCM goes in piece by piece, bytes of the requested format come out as soon as they exist.

`Encoder` cuts the PCM at samples, changes its speed and writes it in a format; formats.py knows the formats.
It knows nothing of requests, sockets or event loops: `feed` computes for a few milliseconds for a second of speech.
"""

from server.audio.formats import CONTENT_TYPES, Format, writer_for
from server.audio.tempo import MAX_SPEED, MIN_SPEED, Tempo
from shared.pcm import BYTES_PER_SAMPLE


class Encoder:
    """Encodes the 24 kHz mono int16 PCM of one answer; used by one thread at a time.

    With `streaming`, `feed` returns the bytes that can be sent, and a decoder can play the first of them alone.
    Without it, `feed` returns nothing and `finish` the whole file, whose header has the true sizes.
    `speed` (0.25 to 4) changes the duration and keeps the pitch; the first sound comes 200 to 300 ms later.
    An encoder that is no longer needed is simply dropped.
    Raises ValueError for an unknown format or a speed out of range.
    """

    def __init__(self, response_format: Format, *, speed: float = 1.0, streaming: bool = True) -> None:
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise ValueError(f"speed is between {MIN_SPEED} and {MAX_SPEED}, not {speed}")
        if response_format not in CONTENT_TYPES:
            raise ValueError(f"there is no audio format {response_format!r}")
        self._half_sample = b""
        self._tempo = Tempo(speed) if speed != 1 else None
        self._writer = writer_for(response_format, streaming=streaming)

    def feed(self, pcm: bytes) -> bytes:
        """Take the next piece of speech, cut anywhere; returns the bytes that can be sent now, possibly none."""
        data = self._half_sample + pcm
        whole = len(data) - len(data) % BYTES_PER_SAMPLE
        self._half_sample = data[whole:]
        data = data[:whole]
        if self._tempo:
            data = self._tempo.feed(data)
        return self._writer.write(data) if data else b""

    def finish(self) -> bytes:
        """The rest of the bytes. ValueError if the PCM ended inside a sample."""
        if self._half_sample:
            raise ValueError("the PCM ends inside a sample")
        last = self._writer.write(self._tempo.finish()) if self._tempo else b""
        return last + self._writer.end()
