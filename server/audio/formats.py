"""The audio formats of answers: their content types, and the writer that turns PCM into bytes of a format.

It owns containers, codecs and their delays. A new format is a name in `Format`, a line in `CONTENT_TYPES` and,
if FFmpeg encodes it, a `_Recipe`.
"""

import array
import io
import struct
from typing import TYPE_CHECKING, Final, Literal, cast

import av
import msgspec
from av.audio.stream import AudioStream

from server.audio.frames import audio_frame
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

_UNKNOWN_SIZE: Final = 0xFFFFFFFF
_WAV_HEADER: Final = struct.Struct("<4sI4s4sIHHIIHH4sI")
_REMEMBERED_PACKETS: Final = 4
"""Packets' worth of speech that is kept, to see at the end whether the last packets have any of it."""

_QUIET: Final = 328
"""1 % of full scale: a last packet that stays below is left out without an audible loss."""

_SHORT: Final = 240
"""10 ms: so much of the end may be left out however loud it is. Where speech breaks off it is not missed,
and the length of an answer stays within 3 % of the speech from 2.7 s on.
"""


class _Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """PyAV's options for one format.

    `undeclared_delay` is the codec's delay in samples (for MP3 with the decoder's 529) if the stream cannot declare it.
    `declared_when_whole`: the header of a finished file declares it.
    `first_packets` are sent together at first: a decoder that has to recognise MP3 by itself needs two frames,
    and Ogg's muxer writes a page when the next one begins.

    Without `page_duration` and `flush_packets`, Ogg would gather two seconds before the first sound is sent.
    MP3's bit reservoir is off, so that packets stand alone and the first can be left out;
    compression level 7 takes a quarter off the cost of the default 5.
    AAC's fast coder takes half the time of the default, which needs up to 19 ms for a single packet;
    either looks 85 ms ahead, so the bytes that are sent after the first 80 ms open and are silent.
    FLAC's levels 0 to 2 use blocks of 24 ms, those above 96 ms.
    """

    codec: str
    container: str
    bit_rate: int | None = None
    undeclared_delay: int = 0
    declared_when_whole: bool = False
    first_packets: int = 1
    codec_options: dict[str, str] = {}
    options: dict[str, str] = {}
    streaming_options: dict[str, str] = {}


_RECIPES: Final[dict[str, _Recipe]] = {
    "mp3": _Recipe(
        codec="libmp3lame",
        container="mp3",
        bit_rate=64_000,
        undeclared_delay=1105,
        declared_when_whole=True,
        first_packets=2,
        codec_options={"reservoir": "0", "compression_level": "7"},
        options={"id3v2_version": "0"},
        streaming_options={"write_xing": "0"},
    ),
    "opus": _Recipe(
        codec="libopus", container="ogg", bit_rate=48_000, first_packets=2, streaming_options={"page_duration": "20000"}
    ),
    "aac": _Recipe(
        codec="aac", container="adts", bit_rate=64_000, undeclared_delay=1024, codec_options={"aac_coder": "fast"}
    ),
    "flac": _Recipe(codec="flac", container="flac", codec_options={"compression_level": "2"}),
}


def writer_for(response_format: Format, *, streaming: bool) -> "_PcmWriter | _CompressedWriter":
    """A writer for the PCM of one answer.

    Its `write` takes whole samples and returns the bytes that can be sent now; `end` returns the rest.
    Without `streaming`, `end` returns the whole file.
    """
    if response_format in _RECIPES:
        return _CompressedWriter(_RECIPES[response_format], streaming=streaming)
    return _PcmWriter(header=response_format == "wav", streaming=streaming)


class _PcmWriter:
    """PCM unchanged; with `header`, behind the 44 bytes that make it a WAV file."""

    def __init__(self, *, header: bool, streaming: bool) -> None:
        self._header = header
        self._started = False
        self._whole = None if streaming else bytearray()

    def write(self, pcm: bytes) -> bytes:
        if self._whole is not None:
            self._whole += pcm
            return b""
        if self._header and not self._started:
            pcm = _wav_header(None) + pcm
        self._started = True
        return pcm

    def end(self) -> bytes:
        if self._whole is None:
            return b"" if self._started or not self._header else _wav_header(None)
        return (_wav_header(len(self._whole)) if self._header else b"") + bytes(self._whole)


def _wav_header(data_bytes: int | None) -> bytes:
    """RIFF, "fmt " and the head of "data"; unknown sizes are all ones, as streaming tools write them."""
    riff_bytes = _UNKNOWN_SIZE if data_bytes is None else _WAV_HEADER.size - 8 + data_bytes
    return _WAV_HEADER.pack(
        *(b"RIFF", riff_bytes, b"WAVE"),
        *(b"fmt ", 16, 1, 1, SAMPLE_RATE, SAMPLE_RATE * BYTES_PER_SAMPLE, BYTES_PER_SAMPLE, 8 * BYTES_PER_SAMPLE),
        *(b"data", _UNKNOWN_SIZE if data_bytes is None else data_bytes),
    )


class _Sink:
    """A file for a muxer that must not seek: the written bytes wait here until `take`."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: bytes) -> int:
        self._written += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._written)
        self._written.clear()
        return taken


class _CompressedWriter:
    """A codec and its container.

    The first packets of a codec hold nothing but its delay, and its last packet is padded.
    Ogg, FLAC and the header of a whole MP3 file tell the player how much to skip; MP3 streams and AAC cannot.
    For these, only the last packet before the first audible one is kept, because the audible one needs its overlap.
    At the end, packets beyond the true length are left out as far as they hold nothing audible.
    If speech breaks off loudly, such an answer is still up to 52 ms (MP3) or 81 ms (AAC) longer.
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
        # The number of the first packet that is sent, and the silence in it before the first sample of speech.
        self._first_sent = 1
        self._lead_in = 0
        self._first_packets = recipe.first_packets
        self._samples_fed = 0
        self._speech_samples = 0
        self._packets_made = 0
        self._packets_sent = 0
        self._recent_pcm = b""
        if recipe.undeclared_delay and (streaming or not recipe.declared_when_whole):
            # When streaming, the first 80 ms (a frame of Qwen3-TTS) must end with a packet and not wait for the next.
            silence = -(FRAME_SAMPLES if streaming else recipe.undeclared_delay) % self._packet_samples
            delay = recipe.undeclared_delay + silence
            self._first_sent = max(1, delay // self._packet_samples)
            self._lead_in = delay - (self._first_sent - 1) * self._packet_samples
            if silence:
                self._encode(bytes(silence * BYTES_PER_SAMPLE))

    def write(self, pcm: bytes) -> bytes:
        if not pcm:
            return b""
        self._speech_samples += samples_of(pcm)
        if self._lead_in:
            kept = _REMEMBERED_PACKETS * self._packet_samples * BYTES_PER_SAMPLE
            self._recent_pcm = (self._recent_pcm + pcm)[-kept:]
        self._mux(self._encode(pcm))
        return self._sink.take() if self._sink and self._packets_sent >= self._first_packets else b""

    def end(self) -> bytes:
        if not self._speech_samples:
            # A file without a packet is not valid in any format but PCM.
            self._mux(self._encode(bytes(BYTES_PER_SAMPLE)))
        packets = self._stream.encode(None)
        if self._lead_in:
            packets = packets[: len(packets) - self._surplus_packets(len(packets))]
        self._mux(packets)
        self._open = False
        self._container.close()
        return self._sink.take() if self._sink else self._file.getvalue()

    def __del__(self) -> None:
        """Free FFmpeg's memory (7 MB for FLAC) if `end` was not called: PyAV leaks an unclosed container."""
        if self._open:
            self._container.close()

    def _encode(self, pcm: bytes) -> list["_Packet"]:
        frame = audio_frame(pcm, self._samples_fed)
        self._samples_fed += frame.samples
        return self._stream.encode(frame)

    def _mux(self, packets: list["_Packet"]) -> None:
        for packet in packets:
            self._packets_made += 1
            if self._packets_made >= self._first_sent:
                self._container.mux(packet)
                self._packets_sent += 1

    def _surplus_packets(self, flushed: int) -> int:
        """The number of the last `flushed` packets that lie beyond the true length and hold nothing audible."""
        recent = array.array("h", self._recent_pcm)
        for surplus in range(flushed):
            kept = self._packets_made + flushed - surplus - self._first_sent + 1
            length = kept * self._packet_samples
            cut = length - self._packet_samples - self._lead_in
            lost = recent[cut - self._speech_samples :] if cut < self._speech_samples else []
            audible = len(lost) > _SHORT and any(abs(sample) > _QUIET for sample in lost)
            fits = length - self._speech_samples <= self._packet_samples / 2
            if fits or audible or kept <= self._first_packets:
                return surplus
        return flushed
