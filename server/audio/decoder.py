"""Recordings of clients, decoded to 24 kHz mono int16 PCM; `python -m server.audio.decoder` is its own process.

It owns everything that touches untrusted audio. Containers and codecs are those of a short list, the demuxer is chosen
here by the first bytes (FFmpeg never guesses, so playlists and the like cannot come up), and FFmpeg opens nothing.

A hostile file of 24 KB can make FFmpeg's demuxers take gigabytes before the first sample, so decoding has a process of
its own, with limits of memory and time that the kernel keeps. It imports nothing of the web (80 ms to be ready).
"""

import array
import io
import re
import resource
import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NoReturn

import av
import av.error

from shared.pcm import BYTES_PER_SAMPLE, SAMPLE_RATE, bytes_for, seconds_of

if TYPE_CHECKING:
    from av.container import InputContainer

MAX_REFERENCE_BYTES: Final = 10 * 2**20
REFUSED: Final = 3
"""The program's exit code where the recording cannot be used; its output is then the reason."""

MEMORY_BYTES: Final = 384 * 2**20
"""Address space of the program: 120 MB are taken before it begins, 40 MB more by the largest honest recordings."""
CPU_S: Final = 10
"""Processor time of the program, which is a hundred times what a minute of speech takes."""

_MAX_STREAMS: Final = 8
_MAX_CHANNELS: Final = 8
_SAMPLE_RATES: Final = range(8_000, 192_001)
_SILENCE: Final = 66
"""0.2 per cent of full scale (-54 dB): a recording that stays below holds no voice."""
_TRUNCATED_BY_S: Final = 0.5
"""How much less than its header says a recording may hold; encoders' delays and rounded headers stay well below."""
_UNKNOWN_WAV_SIZE: Final = 0x7FFF_0000
"""Sizes from here on stand for a WAV that was streamed."""
_FIRST_FRAME_BYTES: Final = 64
"""Within these of its first frame an MP3 file says whether it tells its length."""

_DURATION: Final = re.compile(r"(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d(?:\.\d*)?)")
"""How Matroska's tags tell the length of a track."""

_BOXES_OF_BOXES: Final = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
"""The way to MP4's tables of samples."""

_CODECS: Final = {"flac", "mp3", "mp3float", "aac", "alac", "vorbis", "opus", "libopus"} | {
    name for name in av.codecs_available if name.startswith("pcm_")
}
"""What voice recorders write. Everything else FFmpeg could decode stays out of reach, also when it looks what is there:
two megabytes of cover art unpack to two gigabytes."""


class InvalidAudioError(Exception):
    """The recording cannot be used; the message tells the client why, and is a clause without a capital."""


def decode_reference(data: bytes, *, min_seconds: float, max_seconds: float) -> bytes:
    """The recording in `data` (wav flac mp3 ogg aac m4a webm …) as 24 kHz mono int16 little-endian PCM.

    Decoding ends at `max_seconds`, so that a small file cannot become a large one.
    Raises InvalidAudioError where it is too short, too long, silent, incomplete, or no audio.
    """
    if len(data) > MAX_REFERENCE_BYTES:
        raise InvalidAudioError(f"the recording is larger than {MAX_REFERENCE_BYTES // 2**20} MiB")
    demuxer = _demuxer_of(data)
    if demuxer is None:
        raise InvalidAudioError("this is no audio file of a kind that is understood (wav, flac, mp3, ogg, m4a, webm)")
    try:
        pcm, told_s = _decoded(data, demuxer, bytes_for(max_seconds))
    except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise InvalidAudioError("the recording is damaged or incomplete and cannot be decoded") from error
    seconds = seconds_of(pcm)
    if seconds > max_seconds:
        raise InvalidAudioError(f"the recording is longer than {max_seconds:g} s")
    if told_s is not None and seconds < told_s - _TRUNCATED_BY_S:
        raise InvalidAudioError(
            f"the recording is cut off: its header tells of {told_s:.1f} s, it holds {seconds:.1f} s"
        )
    if seconds < min_seconds:
        raise InvalidAudioError(f"the recording is too short: {seconds:.2f} s, at least {min_seconds:g} s are needed")
    if max(map(abs, array.array("h", pcm)), default=0) < _SILENCE:
        raise InvalidAudioError("the recording is silent")
    return pcm


def _demuxer_of(data: bytes) -> str | None:
    """FFmpeg's name of the container that `data` begins as."""
    head = data[:12]
    found = None
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        found = "wav"
    elif head[:4] == b"fLaC":
        found = "flac"
    elif head[:4] == b"OggS":
        found = "ogg"
    elif head[4:8] == b"ftyp":
        found = "mov"
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        found = "matroska"
    elif head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        found = "aiff"
    elif head[:3] == b"ID3":
        found = "mp3"
    elif len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:  # noqa: PLR2004 -- eleven bits of MPEG sync
        found = "mp3" if head[1] & 0x06 else "aac"
    return found


def _decoded(data: bytes, demuxer: str, max_bytes: int) -> tuple[bytes, float | None]:
    """PCM, a little more than `max_bytes` where there is more, and how long the recording's header says it is."""
    if demuxer == "mov" and _most_samples(data) > len(data):
        raise InvalidAudioError("the recording is damaged: it tells of more samples than it has bytes")
    options = {
        "protocol_whitelist": "none",
        "format_whitelist": demuxer,
        "codec_whitelist": ",".join(_CODECS),
        "max_streams": str(_MAX_STREAMS),
    }
    pcm = bytearray()
    with av.open(io.BytesIO(data), "r", format=demuxer, options=options, io_open=_open_nothing) as container:
        if not container.streams.audio:
            raise InvalidAudioError("the file holds no audio")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec.name not in _CODECS:
            raise InvalidAudioError(f"recordings in {codec.name} are not understood")
        if codec.sample_rate not in _SAMPLE_RATES or not 1 <= codec.channels <= _MAX_CHANNELS:
            raise InvalidAudioError(
                f"{codec.sample_rate} Hz with {codec.channels} channels is not a recording of a voice"
            )
        codec.thread_count = 1
        told_s = _told_seconds(data, demuxer, container)
        resampler = av.AudioResampler("s16", "mono", SAMPLE_RATE)
        for frame in container.decode(stream):
            for piece in resampler.resample(frame):
                pcm += bytes(piece.planes[0])[: piece.samples * BYTES_PER_SAMPLE]
            if len(pcm) > max_bytes:
                return bytes(pcm), None
        for piece in resampler.resample(None):
            pcm += bytes(piece.planes[0])[: piece.samples * BYTES_PER_SAMPLE]
    return bytes(pcm), told_s


def _told_seconds(data: bytes, demuxer: str, container: "InputContainer") -> float | None:
    """How long the recording's own header says it is; None where it says nothing and FFmpeg would only estimate."""
    stream = container.streams.audio[0]
    if demuxer == "wav":
        return _wav_seconds(data)
    if demuxer == "matroska":
        return _matroska_seconds(container)
    has_header = demuxer in {"flac", "mov", "aiff"} or (demuxer == "mp3" and _tells_frames(data))
    return float(stream.duration * stream.time_base) if has_header and stream.duration and stream.time_base else None


def _wav_seconds(data: bytes) -> float | None:
    """The length that a WAV header tells; None where it was written before the length was known."""
    position, bytes_a_second = 12, 0
    while position + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, position)
        if name == b"fmt " and position + 20 <= len(data):
            bytes_a_second = int(struct.unpack_from("<I", data, position + 16)[0])
        if name == b"data":
            known = 0 < size < _UNKNOWN_WAV_SIZE and bytes_a_second > 0
            return size / bytes_a_second if known else None
        position += 8 + size + size % 2
    return None


def _matroska_seconds(container: "InputContainer") -> float | None:
    """The length that the audio track's tag tells; without one the file's, where no other track can make it longer."""
    told = _DURATION.match(container.streams.audio[0].metadata.get("DURATION", ""))
    if told:
        return 3600 * int(told["hours"]) + 60 * int(told["minutes"]) + float(told["seconds"])
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return None


def _tells_frames(data: bytes) -> bool:
    """Whether an MP3 file's first frame, which tags may precede, holds the number of frames (the Xing header)."""
    start = 0
    if data[:3] == b"ID3":
        start = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    frame = data[start : start + _FIRST_FRAME_BYTES]
    return b"Xing" in frame or b"Info" in frame


def _most_samples(data: bytes) -> int:
    """How many samples an MP4 file's largest table of sizes tells of; each is a byte at least."""
    found = [0]
    waiting = [(0, len(data))]
    while waiting:
        for name, start, end in _boxes(data, *waiting.pop()):
            if name in _BOXES_OF_BOXES:
                waiting.append((start, end))
            elif name in {b"stsz", b"stz2"} and start + 12 <= end:
                found.append(struct.unpack_from(">I", data, start + 8)[0])
    return max(found)


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The name of each MP4 box between two positions, and where its content begins and ends."""
    while start + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= end:
            head, size = 16, struct.unpack_from(">Q", data, start + 8)[0]
        stop = min(start + size, end) if size else end
        if stop < start + head:
            return
        yield name, start + head, stop
        start = stop


def _open_nothing(*_arguments: Any) -> NoReturn:
    raise PermissionError("a recording has no other files")


def main(min_seconds: float, max_seconds: float) -> int:
    """Decode standard input to standard output, within limits; the program's exit code, 0 or REFUSED."""
    for what, limit in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_CORE, 0)):
        _, most = resource.getrlimit(what)
        allowed = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(what, (allowed, allowed))
    code = 0
    try:
        answer = decode_reference(sys.stdin.buffer.read(), min_seconds=min_seconds, max_seconds=max_seconds)
    except InvalidAudioError as error:
        answer, code = str(error).encode(), REFUSED
    sys.stdout.buffer.write(answer)
    return code


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), float(sys.argv[2])))
