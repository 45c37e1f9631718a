"""The audio of one answer: PCM goes in piece by piece, bytes of the requested format come out as soon as they exist.

`Encoder` cuts the PCM at samples, changes its speed and its rate, and writes it in a format; formats.py knows the
formats. It knows nothing of requests or sockets: `feed` computes for a few milliseconds for a second of speech.
"""

import asyncio
from importlib import import_module
from typing import TYPE_CHECKING

from server.audio.formats import SAMPLE_RATES, Format, default_rate, writer_for
from server.audio.provenance import Provenance
from server.audio.tempo import MAX_SPEED, MIN_SPEED, Tempo
from shared.pcm import BYTES_PER_SAMPLE, SAMPLE_RATE

if TYPE_CHECKING:
    from server.audio.resampler import Resampler


class Encoder:
    """Encodes the 24 kHz mono int16 PCM of one answer; used by one thread at a time.

    With `streaming`, `feed` returns the bytes that can be sent, and a decoder can play the first of them alone.
    Without it, `feed` returns nothing and `finish` the whole file, whose header has the true sizes.
    `speed` (0.25 to 4) changes the duration and keeps the pitch; the first sound comes 200 to 300 ms later.
    `sample_rate` is one of `SAMPLE_RATES` of the format; None is the format's own.
    `provenance` stands in the metadata of mp3, opus, ogg, flac and a whole wav; the others have no place for it.
    An encoder that is no longer needed is simply dropped.
    Raises ValueError for an unknown format, a rate that the format cannot have, or a speed out of range.
    """

    def __init__(
        self,
        response_format: Format,
        *,
        speed: float = 1.0,
        sample_rate: int | None = None,
        streaming: bool = True,
        provenance: Provenance | None = None,
    ) -> None:
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise ValueError(f"speed is between {MIN_SPEED} and {MAX_SPEED}, not {speed}")
        if response_format not in SAMPLE_RATES:
            raise ValueError(f"there is no audio format {response_format!r}")
        self.sample_rate = sample_rate or default_rate(response_format)
        if self.sample_rate not in SAMPLE_RATES[response_format]:
            raise ValueError(f"{response_format} has no sample rate {sample_rate}")
        self._half_sample = b""
        self._speed = speed
        self._tempo_speed = 1.0
        self._tempo: Tempo | None = None
        self._resampler: Resampler | None = None
        if self.sample_rate != SAMPLE_RATE:
            self._resampler = import_module("server.audio.resampler").Resampler(self.sample_rate)
        self._writer = writer_for(response_format, rate=self.sample_rate, streaming=streaming, provenance=provenance)

    def feed(self, pcm: bytes, rate: float | None = 1.0) -> bytes:
        """Take the next piece of speech, cut anywhere; returns the bytes that can be sent now, possibly none.

        `rate` multiplies the speed of this piece. None leaves its duration as it is: it is the silence of a pause.
        """
        data = self._half_sample + pcm
        whole = len(data) - len(data) % BYTES_PER_SAMPLE
        self._half_sample = data[whole:]
        data = data[:whole]
        speed = effective_speed(self._speed, rate)
        rest = self._set_tempo(speed) if speed != self._tempo_speed else b""
        data = rest + (self._tempo.feed(data) if self._tempo else data)
        if self._resampler:
            data = self._resampler.feed(data)
        return self._writer.write(data) if data else b""

    def finish(self) -> bytes:
        """The rest of the bytes. ValueError if the PCM ended inside a sample."""
        if self._half_sample:
            raise ValueError("the PCM ends inside a sample")
        last = self._set_tempo(1.0)
        if self._resampler:
            last = self._resampler.feed(last) + self._resampler.finish()
        return self._writer.write(last) + self._writer.end()

    def _set_tempo(self, speed: float) -> bytes:
        """Change the speed of what follows; the rest of what came before."""
        rest = self._tempo.finish() if self._tempo else b""
        self._tempo_speed = speed
        self._tempo = Tempo(speed) if speed != 1 else None
        return rest


def effective_speed(speed: float, rate: float | None) -> float:
    """The speed of a piece with that rate, in an answer with that speed; see `Encoder.feed`."""
    return 1.0 if rate is None else min(max(speed * rate, MIN_SPEED), MAX_SPEED)


async def load_resampler() -> None:
    """Import what an `Encoder` with another rate needs. The import takes 0.25 s: too long for the event loop."""
    await asyncio.to_thread(import_module, "server.audio.resampler")
