"""The audio formats of answers: content types, sample rates, and the writer that turns PCM into bytes of a format.

It owns containers, codecs and their delays. A new format is a name in `Format`, a line in `CONTENT_TYPES`, one in
`SAMPLE_RATES` and, if FFmpeg encodes it, a `_Recipe`.
"""

import array
import io
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, cast

import av
import msgspec
from av.audio.stream import AudioStream

from server.audio.frames import audio_frame
from server.audio.provenance import Provenance
from shared.pcm import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE, samples_of

if TYPE_CHECKING:
    _Packet = av.Packet[AudioStream]  # generic for the type checker only

Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm", "ogg", "ulaw", "alaw"]

CONTENT_TYPES: Final[dict[Format, str]] = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "ogg": "audio/ogg",
    "ulaw": "audio/basic",
    "alaw": "audio/x-alaw-basic",
}

_RATES: Final = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_OPUS_RATES: Final = (8_000, 12_000, 16_000, 24_000, 48_000)
_TELEPHONE_RATE: Final = 8_000

SAMPLE_RATES: Final[dict[Format, tuple[int, ...]]] = {
    "mp3": _RATES,
    "opus": _OPUS_RATES,
    "aac": _RATES,
    "flac": _RATES,
    "wav": _RATES,
    "pcm": _RATES,
    "ogg": _OPUS_RATES,
    "ulaw": (_TELEPHONE_RATE,),
    "alaw": (_TELEPHONE_RATE,),
}
"""The rates that each format can have. G.711, the codec of telephones, has one."""

_UNKNOWN_SIZE: Final = 0xFFFFFFFF
_WAV_HEADER: Final = struct.Struct("<4sI4s4sIHHIIHH4sI")
_REMEMBERED_PACKETS: Final = 4
"""Packets' worth of speech that is kept, to see at the end whether the last packets have any of it."""

_LOSSES: Final = ((0.001, 32_768), (0.01, 1_311), (1.0, 328))
"""The limits of a last packet that is left out: so many seconds at most, of samples up to this level.

The last millisecond was faded out. Ten are not missed at 4 % of full scale (-28 dB), behind louder speech.
Any number at 1 % (-40 dB) passes for silence.
The length of an answer stays within 3 % of the speech from 2.7 s on, unless that breaks off loudly.
"""


_SHORTEST_S: Final = 0.1
"""An answer keeps at least this much if packets are left out: the silence of a text without words lasts so long."""


class _Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """PyAV's options for one format.

    `undeclared_delay` is the codec's delay in samples (for MP3 with the decoder's 529) if the stream cannot declare it.
    `declared_when_whole`: the header of a finished file declares it.
    `tagged`: options with which the container has tags; None: it has no place for them.
    `first_packets` are sent together at first: a decoder that has to recognise MP3 by itself needs two frames,
    and Ogg's muxer writes a page when the next one begins.

    Without `page_duration` and `flush_packets`, Ogg would gather two seconds before the first sound is sent.
    MP3's bit reservoir is off, so that packets stand alone and the first can be left out;
    compression level 7 takes a quarter off the cost of the default 5.
    AAC's fast coder takes half the time of the default, which needs up to 19 ms for a single packet;
    either looks 85 ms ahead, so the bytes that are sent after the first 80 ms open and are silent.
    FLAC's levels 0 to 2 use blocks of 24 ms, those above 96 ms.
    AAC has at most six bits for a sample, so 48,000 a second at 8 kHz.
    """

    codec: str
    container: str
    bit_rate: int | None = None
    max_bits_a_sample: int | None = None
    undeclared_delay: int = 0
    declared_when_whole: bool = False
    first_packets: int = 1
    tagged: dict[str, str] | None = None
    codec_options: dict[str, str] = {}
    options: dict[str, str] = {}
    streaming_options: dict[str, str] = {}


_OPUS: Final = _Recipe(
    codec="libopus",
    container="ogg",
    bit_rate=48_000,
    first_packets=2,
    tagged={},
    streaming_options={"page_duration": "20000"},
)
_RECIPES: Final[dict[str, _Recipe]] = {
    "mp3": _Recipe(
        codec="libmp3lame",
        container="mp3",
        bit_rate=64_000,
        undeclared_delay=1105,
        declared_when_whole=True,
        first_packets=2,
        tagged={"id3v2_version": "4"},
        codec_options={"reservoir": "0", "compression_level": "7"},
        options={"id3v2_version": "0"},
        streaming_options={"write_xing": "0"},
    ),
    "opus": _OPUS,
    "ogg": _OPUS,
    "aac": _Recipe(
        codec="aac",
        container="adts",
        bit_rate=64_000,
        max_bits_a_sample=6,
        undeclared_delay=1024,
        codec_options={"aac_coder": "fast"},
    ),
    "flac": _Recipe(codec="flac", container="flac", tagged={}, codec_options={"compression_level": "2"}),
    "ulaw": _Recipe(codec="pcm_mulaw", container="mulaw"),
    "alaw": _Recipe(codec="pcm_alaw", container="alaw"),
}


def default_rate(response_format: Format) -> int:
    """The sample rate of a format if the client asks for none."""
    rates = SAMPLE_RATES[response_format]
    return SAMPLE_RATE if SAMPLE_RATE in rates else rates[0]


def writer_for(
    response_format: Format, *, rate: int, streaming: bool, provenance: Provenance | None
) -> "_PcmWriter | _CompressedWriter":
    """A writer for the PCM of one answer, which has that sample rate.

    Its `write` takes whole samples and returns the bytes that can be sent now; `end` returns the rest.
    Without `streaming`, `end` returns the whole file.
    """
    if response_format in _RECIPES:
        return _CompressedWriter(_RECIPES[response_format], rate=rate, streaming=streaming, provenance=provenance)
    wav_rate = rate if response_format == "wav" else None
    return _PcmWriter(wav_rate=wav_rate, streaming=streaming, provenance=provenance)


class _PcmWriter:
    """PCM unchanged; with `wav_rate`, behind the 44 bytes that make it a WAV file.

    The tags of a whole file follow the PCM: many programs take all from byte 44 on for sound. A streamed file has none:
    its sizes are unknown, so its PCM goes on to its end.
    """

    def __init__(self, *, wav_rate: int | None, streaming: bool, provenance: Provenance | None) -> None:
        self._wav_rate = wav_rate
        self._tags = provenance.riff_chunk() if provenance and wav_rate else b""
        self._started = False
        self._whole = None if streaming else bytearray()

    def write(self, pcm: bytes) -> bytes:
        if self._whole is not None:
            self._whole += pcm
            return b""
        if not self._started:
            pcm = self._header(None) + pcm
        self._started = True
        return pcm

    def end(self) -> bytes:
        if self._whole is None:
            return b"" if self._started else self._header(None)
        return self._header(len(self._whole)) + bytes(self._whole) + self._tags

    def _header(self, data_bytes: int | None) -> bytes:
        return b"" if self._wav_rate is None else _wav_header(self._wav_rate, data_bytes, len(self._tags))


def _wav_header(rate: int, data_bytes: int | None, tag_bytes: int) -> bytes:
    """RIFF, "fmt " and the head of "data"; unknown sizes are all ones, as streaming tools write them."""
    riff_bytes = _UNKNOWN_SIZE if data_bytes is None else _WAV_HEADER.size - 8 + data_bytes + tag_bytes
    return _WAV_HEADER.pack(
        *(b"RIFF", riff_bytes, b"WAVE"),
        *(b"fmt ", 16, 1, 1, rate, rate * BYTES_PER_SAMPLE, BYTES_PER_SAMPLE, 8 * BYTES_PER_SAMPLE),
        *(b"data", _UNKNOWN_SIZE if data_bytes is None else data_bytes),
    )


def _first_samples(rate: int) -> int:
    """The samples that the first 80 ms of speech (a frame of Qwen3-TTS) give; a resampler keeps 25 ms of them back."""
    return FRAME_SAMPLES if rate == SAMPLE_RATE else rate * 55 // 1000


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
    If speech breaks off loudly, such an answer is still up to 61 ms (MP3) or 90 ms (AAC) longer at 24 kHz.
    """

    _open = False

    def __init__(self, recipe: _Recipe, *, rate: int, streaming: bool, provenance: Provenance | None) -> None:
        self._rate = rate
        self._sink = _Sink() if streaming else None
        self._file = io.BytesIO()
        options = recipe.options | ({"flush_packets": "1", **recipe.streaming_options} if streaming else {})
        tags = provenance.tags() if provenance and recipe.tagged is not None else {}
        options |= (recipe.tagged or {}) if tags else {}
        self._container = av.open(self._sink or self._file, "w", format=recipe.container, options=options)
        self._open = True
        self._container.metadata.update(tags)
        stream = self._container.add_stream(recipe.codec, rate, options=recipe.codec_options, layout="mono")
        self._stream = cast("AudioStream", stream)
        if recipe.bit_rate:
            self._stream.bit_rate = min(recipe.bit_rate, rate * (recipe.max_bits_a_sample or recipe.bit_rate))
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
            # When streaming, the first sound must end with a packet and not wait for the next.
            silence = -(_first_samples(rate) if streaming else recipe.undeclared_delay) % self._packet_samples
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
        frame = audio_frame(pcm, self._samples_fed, self._rate)
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
            audible = not self._may_lose(lost)
            fits = length - self._speech_samples <= self._packet_samples / 2
            shortest = length - self._packet_samples < min(self._speech_samples, _SHORTEST_S * self._rate)
            if fits or audible or shortest or kept <= self._first_packets:
                return surplus
        return flushed

    def _may_lose(self, samples: Sequence[int]) -> bool:
        peak = max(map(abs, samples), default=0)
        return any(len(samples) <= seconds * self._rate and peak <= level for seconds, level in _LOSSES)
