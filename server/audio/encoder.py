"""Audio formats: PCM goes in piece by piece, bytes of the format that a client asked for come out as they exist.

It owns containers, codecs, their delays and the change of speed.
It knows nothing of requests, sockets or event loops: `feed` is plain computing, a few milliseconds a second of speech.
"""

import array
import io
import math
import struct
from fractions import Fraction
from typing import TYPE_CHECKING, Final, Literal, Protocol, cast

import av
import av.filter
import msgspec
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream

from shared.pcm import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE, samples_of

if TYPE_CHECKING:
    _Packet = av.Packet[AudioStream]  # generic for the type checker only

Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

CONTENT_TYPES: Final[dict[Format, str]] = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}

MIN_SPEED: Final = 0.25
MAX_SPEED: Final = 4.0

_UNKNOWN_SIZE: Final = 0xFFFFFFFF
_WAV_HEADER: Final = struct.Struct("<4sI4s4sIHHIIHH4sI")
_MIN_ATEMPO: Final = 0.5
_TEMPO_SAMPLES: Final = 960
"""How much atempo is given at once: it holds its output back until it has as much as a piece of input makes."""
_REMEMBERED_PACKETS: Final = 4
"""How many packets' worth of speech is remembered, to see whether the last ones hold any."""
_QUIET: Final = 328
"""One per cent of full scale: what a codec's last packet may hold and still be left out unheard."""
_SHORT: Final = 240
"""10 ms: so little of the end may be left out however loud it is. Where speech breaks off it is not missed,
and an answer keeps to within 3 % of the speech from 2.7 s on.
"""


class _Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What PyAV is told for one format.

    `untold_delay` is the codec's delay in samples (for MP3 with the decoder's 529) that no player is told of;
    `told_when_whole`: a finished file does tell.
    `first_packets` leave together at first: a decoder that has to recognise MP3 by itself wants to see two frames,
    and Ogg's muxer writes a page when the next one begins.

    Without `page_duration` and `flush_packets`, Ogg would gather two seconds before the first sound leaves.
    MP3's bit reservoir is off, so that packets stand alone and the first can be left out;
    compression level 7 takes a quarter off the cost of the default 5.
    AAC's fast coder takes half the time of the default, which needs up to 19 ms for a single packet;
    either looks 85 ms ahead, so that what leaves after the first 80 ms opens and is silent.
    FLAC's levels 0 to 2 use blocks of 24 ms, those above 96 ms.
    """

    codec: str
    container: str
    bit_rate: int | None = None
    untold_delay: int = 0
    told_when_whole: bool = False
    first_packets: int = 1
    codec_options: dict[str, str] = {}
    options: dict[str, str] = {}
    streaming_options: dict[str, str] = {}


_RECIPES: Final[dict[str, _Recipe]] = {
    "mp3": _Recipe(
        codec="libmp3lame",
        container="mp3",
        bit_rate=64_000,
        untold_delay=1105,
        told_when_whole=True,
        first_packets=2,
        codec_options={"reservoir": "0", "compression_level": "7"},
        options={"id3v2_version": "0"},
        streaming_options={"write_xing": "0"},
    ),
    "opus": _Recipe(
        codec="libopus", container="ogg", bit_rate=48_000, first_packets=2, streaming_options={"page_duration": "20000"}
    ),
    "aac": _Recipe(
        codec="aac", container="adts", bit_rate=64_000, untold_delay=1024, codec_options={"aac_coder": "fast"}
    ),
    "flac": _Recipe(codec="flac", container="flac", codec_options={"compression_level": "2"}),
}


class Encoder:
    """One answer's audio, from 24 kHz mono int16 PCM to `response_format`; used once, by one thread at a time.

    Streaming, `feed` gives what can leave already; what came with the first sound decodes by itself.
    Otherwise `feed` gives nothing and `finish` the whole file, its header telling the true sizes.
    An encoder that is no longer needed is simply dropped.
    `speed` (0.25 to 4) changes the duration and leaves the pitch; its first sound comes 200 to 300 ms later.
    Raises ValueError for a format or a speed that there is not.
    """

    def __init__(self, response_format: Format, *, speed: float = 1.0, streaming: bool = True) -> None:
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise ValueError(f"speed is between {MIN_SPEED} and {MAX_SPEED}, not {speed}")
        if response_format not in CONTENT_TYPES:
            raise ValueError(f"there is no audio format {response_format!r}")
        self._rest = b""
        self._tempo = _Tempo(speed) if speed != 1 else None
        self._writer: _Writer
        if response_format in _RECIPES:
            self._writer = _Compressed(_RECIPES[response_format], streaming=streaming)
        else:
            self._writer = _Plain(header=response_format == "wav", streaming=streaming)

    def feed(self, pcm: bytes) -> bytes:
        """Take the next piece of speech, cut anywhere; returns the bytes that can be sent now, possibly none."""
        data = self._rest + pcm
        whole = len(data) - len(data) % BYTES_PER_SAMPLE
        self._rest = data[whole:]
        data = data[:whole]
        if self._tempo:
            data = self._tempo.feed(data)
        return self._writer.write(data) if data else b""

    def finish(self) -> bytes:
        """Everything that is still to be sent. ValueError where the PCM ended inside a sample."""
        if self._rest:
            raise ValueError("the PCM ends inside a sample")
        last = self._writer.write(self._tempo.finish()) if self._tempo else b""
        return last + self._writer.end()


class _Tempo:
    """Changes the duration of speech and leaves its pitch: FFmpeg's atempo filter, whose lowest factor is 0.5.

    Its output is a few milliseconds off, so the last samples are cut or filled up to exactly `fed / speed`.
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
        self._given = 0

    def feed(self, pcm: bytes) -> bytes:
        step = _TEMPO_SAMPLES * BYTES_PER_SAMPLE
        pieces = []
        for start in range(0, len(pcm), step):
            frame = _frame(pcm[start : start + step], self._fed)
            self._fed += frame.samples
            self._graph.push(frame)
            pieces.append(self._pull())
        return b"".join(pieces)

    def finish(self) -> bytes:
        self._graph.push(None)
        last = self._pull()
        missing = self._due() - self._given
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
            samples = min(frame.samples, self._due() - self._given)
            pieces.append(bytes(frame.planes[0])[: samples * BYTES_PER_SAMPLE])
            self._given += samples
        return b"".join(pieces)


class _Writer(Protocol):
    def write(self, pcm: bytes) -> bytes: ...

    def end(self) -> bytes: ...


class _Plain:
    """PCM as it is, or behind the 44 bytes that make it WAV."""

    def __init__(self, *, header: bool, streaming: bool) -> None:
        self._header = header
        self._started = False
        self._held = None if streaming else bytearray()

    def write(self, pcm: bytes) -> bytes:
        if self._held is not None:
            self._held += pcm
            return b""
        if self._header and not self._started:
            pcm = _wav_header(None) + pcm
        self._started = True
        return pcm

    def end(self) -> bytes:
        if self._held is None:
            return b"" if self._started or not self._header else _wav_header(None)
        return (_wav_header(len(self._held)) if self._header else b"") + bytes(self._held)


def _wav_header(data_bytes: int | None) -> bytes:
    """RIFF, "fmt " and the head of "data"; sizes that are not known yet are all ones, as streaming tools write them."""
    riff_bytes = _UNKNOWN_SIZE if data_bytes is None else _WAV_HEADER.size - 8 + data_bytes
    return _WAV_HEADER.pack(
        *(b"RIFF", riff_bytes, b"WAVE"),
        *(b"fmt ", 16, 1, 1, SAMPLE_RATE, SAMPLE_RATE * BYTES_PER_SAMPLE, BYTES_PER_SAMPLE, 8 * BYTES_PER_SAMPLE),
        *(b"data", _UNKNOWN_SIZE if data_bytes is None else data_bytes),
    )


class _Sink:
    """What a muxer writes to where it must not seek: the bytes wait here to be taken."""

    def __init__(self) -> None:
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        self._held += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._held)
        self._held.clear()
        return taken


class _Compressed:
    """A codec and its container.

    A codec begins with packets that hold nothing but its own delay, and its last packet is padded.
    Ogg, FLAC and the header of a whole MP3 file tell the player how much to skip; MP3 streams and AAC cannot.
    There, of the packets before the first audible one only the last stays: it carries the overlap which that one needs.
    At the end, packets beyond the true length are left out as far as they hold nothing that could be heard.
    Where speech breaks off loudly, such an answer is still up to 52 ms (MP3) or 81 ms (AAC) longer.
    """

    _open = False

    def __init__(self, recipe: _Recipe, *, streaming: bool) -> None:
        self._sink = _Sink() if streaming else None
        self._file = io.BytesIO()
        options = recipe.options | ({"flush_packets": "1", **recipe.streaming_options} if streaming else {})
        self._container = av.open(self._sink or self._file, "w", format=recipe.container, options=options)
        self._open = True
        stream = self._container.add_stream(recipe.codec, SAMPLE_RATE, options=recipe.codec_options, layout="mono")
        self._stream = cast("AudioStream", stream)
        if recipe.bit_rate:
            self._stream.bit_rate = recipe.bit_rate
        self._stream.codec_context.open()
        self._packet_samples = self._stream.codec_context.frame_size
        # Packets as they leave now: the first of them, and the silence in them before the first sample of speech.
        self._first_sent = 1
        self._lead_in = 0
        self._first_packets = recipe.first_packets
        self._fed = 0
        self._spoken = 0
        self._made = 0
        self._sent = 0
        self._recent = b""
        if recipe.untold_delay and (streaming or not recipe.told_when_whole):
            # Streaming, the first 80 ms (a frame of Qwen3-TTS) are to end with a packet, not to wait for the next ones.
            silence = -(FRAME_SAMPLES if streaming else recipe.untold_delay) % self._packet_samples
            delay = recipe.untold_delay + silence
            self._first_sent = max(1, delay // self._packet_samples)
            self._lead_in = delay - (self._first_sent - 1) * self._packet_samples
            if silence:
                self._encode(bytes(silence * BYTES_PER_SAMPLE))

    def write(self, pcm: bytes) -> bytes:
        if not pcm:
            return b""
        self._spoken += samples_of(pcm)
        if self._lead_in:
            self._recent = (self._recent + pcm)[-_REMEMBERED_PACKETS * self._packet_samples * BYTES_PER_SAMPLE :]
        self._mux(self._encode(pcm))
        return self._sink.take() if self._sink and self._sent >= self._first_packets else b""

    def end(self) -> bytes:
        if not self._spoken:
            # No format but PCM can say nothing: a file without a packet is none.
            self._mux(self._encode(bytes(BYTES_PER_SAMPLE)))
        packets = self._stream.encode(None)
        if self._lead_in:
            packets = packets[: len(packets) - self._padding(len(packets))]
        self._mux(packets)
        self._open = False
        self._container.close()
        return self._sink.take() if self._sink else self._file.getvalue()

    def __del__(self) -> None:
        """Give back what FFmpeg holds (7 MB for FLAC) where nobody called `end`: PyAV leaks an unclosed container."""
        if self._open:
            self._container.close()

    def _encode(self, pcm: bytes) -> list["_Packet"]:
        frame = _frame(pcm, self._fed)
        self._fed += frame.samples
        return self._stream.encode(frame)

    def _mux(self, packets: list["_Packet"]) -> None:
        for packet in packets:
            self._made += 1
            if self._made >= self._first_sent:
                self._container.mux(packet)
                self._sent += 1

    def _padding(self, flushed: int) -> int:
        """How many of the last `flushed` packets go beyond the true length and hold nothing that could be heard."""
        recent = array.array("h", self._recent)
        for surplus in range(flushed):
            kept = self._made + flushed - surplus - self._first_sent + 1
            length = kept * self._packet_samples
            cut = length - self._packet_samples - self._lead_in
            lost = recent[cut - self._spoken :] if cut < self._spoken else []
            audible = len(lost) > _SHORT and any(abs(sample) > _QUIET for sample in lost)
            fits = length - self._spoken <= self._packet_samples / 2
            if fits or audible or kept <= self._first_packets:
                return surplus
        return flushed


def _frame(pcm: bytes, position: int) -> AudioFrame:
    """PCM as FFmpeg takes it; `position` is the number of samples before it."""
    frame = AudioFrame(format="s16", layout="mono", samples=samples_of(pcm), align=1)
    frame.planes[0].update(pcm)
    frame.sample_rate = SAMPLE_RATE
    frame.pts = position
    return frame
