"""The decoder: speech is accepted; everything else is refused, opens no file and takes bounded memory."""

import array
import contextlib
import io
import itertools
import random
import struct
import subprocess
import sys
import wave
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import NamedTuple

import av
import numpy as np
import pytest
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from server.audio.decoder import CPU_S, MAX_REFERENCE_BYTES, MEMORY_BYTES, REFUSED, decode_reference
from server.audio.encoder import Encoder
from server.audio.file_kinds import InvalidAudioError
from server.audio.formats import Format
from shared.pcm import SAMPLE_RATE, samples_of, seconds_of
from tests.audio import peak, tone

VOICE = tone(2.5, fade_s=0.01)


def file_of(
    container: str,
    codec: str,
    rate: int = 44_100,
    layout: str = "stereo",
    pcm: bytes = VOICE,
    *,
    options: Mapping[str, str] = MappingProxyType({}),
    title: str = "",
) -> bytes:
    """`pcm` as another program's encoder writes it."""
    target = io.BytesIO()
    with av.open(target, "w", format=container, options=dict(options)) as output:
        output.metadata["title"] = title
        stream = output.add_stream(codec, rate=rate, layout=layout, options=dict(options))
        assert isinstance(stream, AudioStream)
        frame = AudioFrame(format="s16", layout="mono", samples=samples_of(pcm), align=1)
        frame.planes[0].update(pcm)
        frame.sample_rate = SAMPLE_RATE
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            piece.pts = None
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return target.getvalue()


def our_file(audio_format: Format, *, streaming: bool = False) -> bytes:
    """A file that this server's encoder wrote."""
    encoder = Encoder(audio_format, streaming=streaming)
    return encoder.feed(VOICE) + encoder.finish()


RECORDINGS: dict[str, Callable[[], bytes]] = {
    "wav": partial(file_of, "wav", "pcm_s16le"),
    "wav-24bit-96k": partial(file_of, "wav", "pcm_s24le", 96_000),
    "wav-ulaw-8k": partial(file_of, "wav", "pcm_mulaw", 8_000, "mono"),
    "flac": partial(file_of, "flac", "flac", 48_000),
    "mp3": partial(file_of, "mp3", "libmp3lame"),
    "ogg-opus": partial(file_of, "ogg", "libopus", 48_000),
    "m4a": partial(file_of, "ipod", "aac"),
    "m4a-alac": partial(file_of, "ipod", "alac"),
    "webm": partial(file_of, "webm", "libopus", 48_000),
    "aiff": partial(file_of, "aiff", "pcm_s16be"),
    "our-streamed-wav": partial(our_file, "wav", streaming=True),
    "our-streamed-mp3": partial(our_file, "mp3", streaming=True),
    "our-aac": partial(our_file, "aac"),
    "wav-adpcm-ima": partial(file_of, "wav", "adpcm_ima_wav", 16_000, "mono"),
    "wav-adpcm-ms": partial(file_of, "wav", "adpcm_ms", 22_050, "mono"),
    "wav-mp3": partial(file_of, "wav", "libmp3lame"),
    "rf64": partial(file_of, "wav", "pcm_s16le", options={"rf64": "always"}),
    "au": partial(file_of, "au", "pcm_s16be"),
    "au-ulaw-8k": partial(file_of, "au", "pcm_mulaw", 8_000, "mono"),
    "caf": partial(file_of, "caf", "pcm_s16be"),
    "caf-alac": partial(file_of, "caf", "alac"),
    "caf-adpcm": partial(file_of, "caf", "adpcm_ima_qt"),
    "w64": partial(file_of, "w64", "pcm_s24le"),
    "amr": partial(file_of, "amr", "libopencore_amrnb", 8_000, "mono"),
    "3gp-amr": partial(file_of, "3gp", "libopencore_amrnb", 8_000, "mono"),
    "3gp-aac": partial(file_of, "3gp", "aac", 16_000, "mono"),
    "mov": partial(file_of, "mov", "pcm_s16le"),
}


@cache
def recording(name: str) -> bytes:
    """One of RECORDINGS."""
    return RECORDINGS[name]()


DECLARE_THEIR_LENGTH = ["flac", "mp3", "m4a", "m4a-alac", "webm", "aiff"]


BARE_KB = 40 * 1024
"""Limit of resident memory of the program with a tiny input: 34 MB were measured."""

MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(code, used.ru_maxrss, used.ru_utime + used.ru_stime, file=sys.stderr)
"""
"""Runs a program from a small process, because a child's peak memory begins with that of its parent."""


class Ended(NamedTuple):
    """How the program ended, and the memory and time that it took."""

    code: int
    output: bytes
    kilobytes: int
    cpu_s: float


def program(data: bytes) -> Ended:
    """Run `python -m server.audio.decoder` on `data`."""
    command = [sys.executable, "-S", "-c", MEASURED, sys.executable, "-m", "server.audio.decoder"]
    ended = subprocess.run(command, input=data, capture_output=True, check=True)
    code, kilobytes, cpu_s = ended.stderr.split()[-3:]
    return Ended(int(code), ended.stdout, int(kilobytes), float(cpu_s))


def with_video(container: str, audio: str, video: str, voice_s: float, pictures_s: int) -> bytes:
    """A clip whose pictures go on after the voice has ended."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as output:
        pictures = output.add_stream(video, rate=5, width=32, height=32, pix_fmt="yuv420p")
        stream = output.add_stream(audio, rate=48_000, layout="mono")
        assert isinstance(pictures, VideoStream)
        assert isinstance(stream, AudioStream)
        for _ in range(5 * pictures_s):
            output.mux(pictures.encode(VideoFrame(32, 32, "yuv420p")))
        output.mux(pictures.encode(None))
        frame = AudioFrame(format="s16", layout="mono", samples=samples_of(tone(voice_s)), align=1)
        frame.planes[0].update(tone(voice_s))
        frame.sample_rate = SAMPLE_RATE
        resampler = av.AudioResampler(stream.codec_context.format, "mono", 48_000)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            piece.pts = None
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return target.getvalue()


def png(side: int) -> bytes:
    """A black square of eight bytes a pixel."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes(1 + 8 * side)) for _ in range(side)]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)), (b"IDAT", b"".join(rows) + packer.flush())]
    chunks = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in [*parts, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_cover(flac: bytes, picture: bytes) -> bytes:
    """A FLAC file with cover art behind its first block, which is 42 bytes with the file's mark."""
    block = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 0, 0, 0, 0, len(picture)) + picture
    first = bytes([flac[4] & 0x7F])  # it is not the last one any more
    return flac[:4] + first + flac[5:42] + b"\x06" + len(block).to_bytes(3, "big") + block + flac[42:]


def with_samples(mp4: bytes, count: int) -> bytes:
    """An MP4 file whose tables declare `count` samples of one byte."""
    data = bytearray(mp4)
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, count)
    struct.pack_into(">I", data, data.index(b"stts") + 12, count)
    struct.pack_into(">I", data, data.index(b"stsc") + 16, count)
    return bytes(data)


def fragmented(count: int) -> bytes:
    """A fragmented MP4 file whose first fragment declares `count` samples and describes none."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as output:
        stream = output.add_stream("aac", rate=48_000, layout="mono")
        assert isinstance(stream, AudioStream)
        for _ in range(50):
            frame = AudioFrame(format="fltp", layout="mono", samples=1024)
            frame.planes[0].update(bytes(4096))
            frame.sample_rate = 48_000
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    data = bytearray(target.getvalue())
    run = data.index(b"trun")
    # No field for each sample, so that a sample takes no byte of the file.
    struct.pack_into(">II", data, run + 4, 1, count)
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_are_decode_reference(name: str) -> None:
    """Each kind of file becomes 24 kHz mono PCM of the right length, level and pitch; codecs of blocks pad the last."""
    pcm = decode_reference(recording(name))
    assert seconds_of(pcm) == pytest.approx(2.5, abs=0.13 if name in {"wav-adpcm-ms", "3gp-aac"} else 0.07)
    assert 5_500 < peak(pcm) < 11_500  # FFmpeg makes two channels of one 3 dB quieter
    inside = array.array("h", pcm)[SAMPLE_RATE // 2 : SAMPLE_RATE * 2]
    rising = sum(before < 0 <= after for before, after in itertools.pairwise(inside))
    assert rising == pytest.approx(1.5 * 300, abs=2)


@pytest.mark.parametrize("name", DECLARE_THEIR_LENGTH)
def test_truncated_files_are_refused(name: str) -> None:
    """A file that lost its second half is not taken for a shorter recording."""
    with pytest.raises(InvalidAudioError, match=r"cut off|damaged or incomplete"):
        decode_reference(recording(name)[: len(recording(name)) // 2])


@pytest.mark.parametrize(
    ("container", "audio", "video"),
    [("webm", "libopus", "libvpx"), ("mp4", "aac", "mpeg4")],
)
def test_video_does_not_change_the_length(container: str, audio: str, video: str) -> None:
    """A recording whose video is two seconds longer is not cut off; a truncated clip is."""
    clip = with_video(container, audio, video, 4.0, 6)
    assert seconds_of(decode_reference(clip)) == pytest.approx(4.0, abs=0.07)
    without_tags = clip.replace(b"DURATION", b"HOW_LONG")
    assert seconds_of(decode_reference(without_tags)) == pytest.approx(4.0, abs=0.07)
    with pytest.raises(InvalidAudioError, match=r"cut off|damaged or incomplete"):
        decode_reference(clip[: len(clip) // 2])


def test_a_title_is_not_a_header() -> None:
    """The mark of the Xing header in a tag is not taken for it: FFmpeg would only estimate the length."""
    hum_then_noise = tone(4.0) + random.Random(1).randbytes(2 * 2 * SAMPLE_RATE)  # noqa: S311 - a test's dice
    variable = {"flags": "+qscale", "global_quality": str(5 * 118)}
    said = file_of("mp3", "libmp3lame", SAMPLE_RATE, "mono", hum_then_noise, options=variable, title="Info for you")
    headless = said.replace(b"Xing", bytes(4))
    with av.open(io.BytesIO(headless)) as container:
        stream = container.streams.audio[0]
        assert stream.duration is not None
        assert stream.time_base is not None
        assert stream.duration * stream.time_base > 7  # the beginning is simple, and so is FFmpeg's estimate
    assert seconds_of(decode_reference(headless)) == pytest.approx(6.0, abs=0.1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"R",
        b"hello, this is text" * 100,
        bytes(20_000),
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/secret.wav\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"\x89PNG\r\n\x1a\n" + bytes(1000),
        b"RIFF\x00\x00\x00\x00WAVE",
        b"OggS" + bytes(500),
        b"\xff\xfb\x90\x00" * 2_000,
        b"\x00\x00\x00\x18ftypM4A " + bytes(500),
        b"\x1a\x45\xdf\xa3" + bytes(500),
        random.Random(7).randbytes(50_000),  # noqa: S311 - a test's dice
    ],
    ids=range(13),
)
def test_other_files_are_refused(data: bytes) -> None:
    """Text, pictures, playlists, noise and bare headers give an error with the reason."""
    with pytest.raises(
        InvalidAudioError,
        match=r"not an audio file|file is empty|no audio|damaged or incomplete|too short|not supported|cannot be used",
    ):
        decode_reference(data)


def test_codecs_off_the_list_are_refused() -> None:
    """FFmpeg's hundreds of other decoders are never used; the message says what to send."""
    with pytest.raises(InvalidAudioError, match="recordings in the codec ac3 are not supported; send wav, flac"):
        decode_reference(file_of("matroska", "ac3", 48_000))


def test_codecs_that_ffmpeg_does_not_know_are_refused() -> None:
    """A codec without a decoder is a refusal, not a traceback in the log."""
    with pytest.raises(InvalidAudioError, match="in an unknown codec are not supported; send wav, flac"):
        decode_reference(recording("caf").replace(b"lpcm", b"zzzz"))


NOISE = random.Random(3).randbytes(5_000)  # noqa: S311 - a test's dice
TAG = b"ID3\x03\x00\x00\x00\x00\x02\x00" + bytes(256)
COVER = b"ID3\x04\x00\x00\x00\x00" + bytes([5_000 >> 7, 5_000 & 0x7F]) + NOISE
FOOTED = b"ID3\x04\x00\x10\x00\x00\x00\x08" + bytes(8) + b"3DI\x04\x00\x10\x00\x00\x00\x08"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flac", "our-aac", "mp3", "wav", "ogg-opus", "aiff"])
def test_tags_are_skipped(name: str) -> None:
    """ID3 tags before any container change nothing; their cover art is not looked at."""
    bare = decode_reference(recording(name))
    for tag in (TAG, COVER, TAG + COVER, FOOTED):
        assert decode_reference(tag + recording(name)) == bare


@pytest.mark.parametrize(
    "junk", [bytes(1), bytes(1_000), bytes(60_000), NOISE, TAG + bytes(500), b"\xff" * 99, b"\xff\xfb\x90\x00" * 9]
)
@pytest.mark.parametrize("name", ["our-streamed-mp3", "our-aac"])
def test_junk_before_the_first_frame_is_skipped(name: str, junk: bytes) -> None:
    """Zeros, noise, and headers without a frame behind them may stand before MP3 and AAC."""
    assert decode_reference(junk + recording(name)) == decode_reference(recording(name))


@pytest.mark.parametrize("name", ["our-streamed-mp3", "our-aac"])
@pytest.mark.parametrize("cut", [1, 100, 1_000])
def test_a_stream_may_begin_anywhere(name: str, cut: int) -> None:
    """A recording of a stream begins within a frame; the rest is what came."""
    assert seconds_of(decode_reference(recording(name)[cut:])) == pytest.approx(2.5, abs=0.35)


def test_junk_has_a_limit() -> None:
    """The first frame is not looked for in a whole file of something else."""
    with pytest.raises(InvalidAudioError, match="not an audio file"):
        decode_reference(bytes(70_000) + recording("mp3"))


@pytest.mark.parametrize("data_size", [0, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000, 2_000_000_000, 130_000, 0xFFFF_FFFF])
def test_a_wav_is_what_came(data_size: int) -> None:
    """Programs that stream write all kinds of sizes; beyond the end of the file, none of them counts."""
    for riff_size in (0, 0x7FFF_FFFF, 0xFFFF_FFFF):
        header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", riff_size, b"WAVE", b"fmt ", 16, 1, 1, 24_000, 48_000, 2, 16)
        assert decode_reference(header + struct.pack("<4sI", b"data", data_size) + VOICE) == VOICE


@pytest.mark.parametrize("name", ["wav", "wav-24bit-96k", "wav-ulaw-8k", "w64", "au", "rf64", "wav-adpcm-ima"])
def test_a_wav_cut_off_is_what_came(name: str) -> None:
    """The first half of a file is 1.25 s."""
    assert seconds_of(decode_reference(recording(name)[: len(recording(name)) // 2])) == pytest.approx(1.25, abs=0.03)


def samples_as_wav(samples: "np.ndarray[tuple[int, ...], np.dtype[np.int16]]") -> bytes:
    """A WAV file of 24 kHz; the second axis is the channels."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((samples.shape[1] if samples.ndim > 1 else 1, 2, SAMPLE_RATE, 0, "NONE", ""))
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


SAMPLES = np.frombuffer(VOICE, "<i2").astype(int)
NOTHING = np.zeros_like(SAMPLES)


@pytest.mark.parametrize(
    ("samples", "low", "high"),
    [
        (np.stack([SAMPLES, NOTHING], 1), 4_400, 9_100),
        (np.stack([NOTHING, SAMPLES], 1), 4_400, 9_100),
        (SAMPLES + 8_000, 16_900, 17_100),
        (SAMPLES // 40 - 12_000, 12_000, 12_300),
        (SAMPLES // 90, 95, 105),
        ((SAMPLES * 20).clip(-32_768, 32_767), 32_767, 32_768),
    ],
    ids=["left", "right", "offset", "quiet and offset", "quiet", "clipped"],
)
def test_poor_recordings_are_used(
    samples: "np.ndarray[tuple[int, ...], np.dtype[np.int16]]", low: int, high: int
) -> None:
    """A dead channel, an offset, a low or a high level are no reason to refuse a voice."""
    pcm = decode_reference(samples_as_wav(samples))
    assert seconds_of(pcm) == 2.5
    assert low <= peak(pcm) <= high


@pytest.mark.slow
@pytest.mark.parametrize(
    ("container", "codec", "rate"), [("ipod", "aac", 8_000), ("webm", "libopus", 8_000), ("wav", "pcm_mulaw", 8_000)]
)
def test_a_minute_and_a_codecs_padding(container: str, codec: str, rate: int) -> None:
    """Exactly sixty seconds are accepted, whatever the codec puts behind them."""
    minute = tone(1.0) + bytes(59 * 2 * SAMPLE_RATE)
    fast = {"compression_level": "0"}
    assert seconds_of(decode_reference(file_of(container, codec, rate, "mono", minute, options=fast))) == 60


@pytest.mark.parametrize(("seconds", "accepted"), [(60.4, True), (60.6, False)])
def test_the_padding_has_a_limit(seconds: float, *, accepted: bool) -> None:
    """Half a second behind the minute is cut off; more is too long."""
    data = samples_as_wav(np.resize(SAMPLES, round(seconds * SAMPLE_RATE)))
    if accepted:
        assert seconds_of(decode_reference(data)) == 60
    else:
        with pytest.raises(InvalidAudioError, match=r"too long: 60\.60 s, at most 60 s"):
            decode_reference(data)


@pytest.mark.parametrize("audio_format", ["mp3", "aac", "wav"])
def test_too_long_streams_say_how_long(audio_format: Format) -> None:
    """Also a file without a length in its header is measured to its end."""
    encoder = Encoder(audio_format, sample_rate=8_000)
    data = encoder.feed(tone(1.0) + bytes(74 * 2 * SAMPLE_RATE)) + encoder.finish()
    with pytest.raises(InvalidAudioError, match=r"too long: 75\.\d\d s, at most 60 s"):
        decode_reference(data)


@pytest.mark.parametrize("rate", [4_000, 384_000])
def test_odd_sample_rates_are_refused(rate: int) -> None:
    """A sample rate that no voice recorder uses is refused before resampling."""
    with pytest.raises(InvalidAudioError, match="Hz and 2 channels is not supported"):
        decode_reference(file_of("wav", "pcm_s16le", rate))


def test_too_short() -> None:
    """The message gives the length and the least length."""
    with pytest.raises(InvalidAudioError, match=r"too short: 0\.50 s, at least 1 s"):
        decode_reference(file_of("wav", "pcm_s16le", pcm=tone(0.5)))


def test_too_long() -> None:
    """A recording over the limit is refused, not cut."""
    with pytest.raises(InvalidAudioError, match=r"too long: 61\.00 s, at most 60 s"):
        decode_reference(file_of("flac", "flac", SAMPLE_RATE, "mono", tone(1.0) * 61))


@pytest.mark.slow
def test_small_files_cannot_become_large() -> None:
    """Of ten minutes of silence in half a megabyte of FLAC, decoding stops at the limit and memory stays small."""
    encoder = Encoder("flac")
    bomb = encoder.feed(bytes(600 * SAMPLE_RATE * 2)) + encoder.finish()
    assert len(bomb) < 600_000
    ended = program(bomb)
    assert (ended.code, ended.output) == (REFUSED, b"the recording is too long: 600.00 s, at most 60 s can be used")
    assert ended.kilobytes < BARE_KB + 16 * 1024  # ten minutes are 28 MB


@pytest.mark.slow
def test_pictures_are_not_decoded() -> None:
    """Cover art of 128 MB is not decoded, and the recording around it is accepted."""
    ended = program(with_cover(recording("flac"), png(4_000)))
    assert ended.code == 0
    assert seconds_of(ended.output) == pytest.approx(2.5, abs=0.07)
    assert ended.kilobytes < BARE_KB + 16 * 1024


@pytest.mark.parametrize("name", ["m4a", "m4a-alac"])
def test_tables_larger_than_their_file_are_refused(name: str) -> None:
    """An MP4 file that declares a hundred million samples is refused before FFmpeg makes an index of them."""
    ended = program(with_samples(recording(name), 100_000_000))
    assert ended.code == REFUSED
    assert ended.output == b"the recording is damaged: it declares more samples than it has bytes"
    assert ended.kilobytes < BARE_KB + 16 * 1024


def test_the_kernel_ends_what_takes_more() -> None:
    """The limits hold where no check does: here a fragment of a few bytes that declares twelve million samples."""
    ended = program(fragmented(12_000_000))
    assert ended.code == REFUSED or ended.code < 0
    assert len(ended.output) < 200
    assert ended.kilobytes < MEMORY_BYTES // 1024
    assert ended.cpu_s < CPU_S + 1


@pytest.mark.slow
def test_the_program_decodes_the_largest_recordings() -> None:
    """Ten megabytes of eight channels at 192 kHz are accepted."""
    large = file_of("wav", "pcm_s16le", 192_000, "7.1", tone(3.4))
    assert MAX_REFERENCE_BYTES - 2**18 < len(large) < MAX_REFERENCE_BYTES
    ended = program(large)
    assert ended.code == 0
    assert seconds_of(ended.output) == pytest.approx(3.4, abs=0.07)


def test_the_program_imports_nothing_of_the_web() -> None:
    """The program starts for each recording, so it must start fast."""
    check = "import sys, server.audio.decoder; print({'litestar', 'asyncio', 'numpy', 'ssl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], check=True, capture_output=True).stdout == b"set()\n"


def test_too_many_bytes() -> None:
    """A file over 10 MiB is refused before it is parsed."""
    with pytest.raises(InvalidAudioError, match="larger than 10 MiB"):
        decode_reference(recording("wav") + bytes(MAX_REFERENCE_BYTES))


@pytest.mark.parametrize("amplitude", [0.0, 40.0])
def test_silence_is_refused(amplitude: float) -> None:
    """A recording of a muted microphone is refused, also if its sound card adds an offset."""
    for offset in (0, 500):
        samples = np.frombuffer(tone(2.0, amplitude=amplitude), "<i2") + offset
        with pytest.raises(InvalidAudioError, match=r"silent: 2\.00 s without a voice"):
            decode_reference(samples_as_wav(samples))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "ogg-opus", "m4a", "webm", "w64", "amr", "au"])
def test_damaged_files_are_an_error_or_audio(name: str) -> None:
    """Whatever bytes are changed, the result is bounded PCM or an InvalidAudioError."""
    chance = random.Random(name)  # noqa: S311 - a test's dice
    for _ in range(20):
        data = bytearray(recording(name))
        for _ in range(chance.choice([1, 4, 64])):
            data[chance.randrange(min(len(data), chance.choice([64, 4_096, len(data)])))] = chance.randrange(256)
        with contextlib.suppress(InvalidAudioError):
            assert seconds_of(decode_reference(bytes(data))) <= 60
