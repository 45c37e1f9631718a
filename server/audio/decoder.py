"""Uploaded recordings are decoded here to 24 kHz mono int16 PCM, by the program `python -m server.audio.decoder`.

This module owns everything that touches untrusted audio. It accepts a short list of containers and codecs.
It chooses the demuxer itself by the first bytes, so FFmpeg never guesses and never meets a playlist.
It lets FFmpeg open no other file.

A hostile file of 24 KB can make FFmpeg's demuxers take gigabytes before the first sample.
So each file is decoded in a process of its own, whose memory and time the kernel limits.
That process imports nothing of the web: it is ready after 80 ms.
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
from shared.recordings import MAX_RECORDING_S, length_problem

if TYPE_CHECKING:
    from av.container import InputContainer

MAX_REFERENCE_BYTES: Final = 10 * 2**20
REFUSED: Final = 3
"""The program's exit code if the recording cannot be used; its output is then the reason."""

MEMORY_BYTES: Final = 384 * 2**20
"""Limit of the program's address space: 120 MB at its start, and 40 MB more for the largest honest recordings."""

CPU_S: Final = 10
"""Limit of the program's processor time: a hundred times what a minute of speech takes."""

_MAX_STREAMS: Final = 8
_MAX_CHANNELS: Final = 8
_SAMPLE_RATES: Final = range(8_000, 192_001)
_SILENCE: Final = 66
"""0.2 % of full scale (-54 dB): a recording that stays below has no voice in it."""

_MAX_MISSING_S: Final = 0.5
"""A recording may be so much shorter than its header says; encoder delays and rounded headers stay well below."""

_UNKNOWN_WAV_SIZE: Final = 0x7FFF_0000
"""A streamed WAV has a size from here on."""

_FIRST_FRAME_BYTES: Final = 64
"""The Xing header of an MP3 file is within these bytes of its first frame."""

_DURATION: Final = re.compile(r"(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d(?:\.\d*)?)")
"""A track's length in Matroska's tags."""

_BOXES_OF_BOXES: Final = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
"""The boxes of an MP4 file that lead to its tables of samples."""

_CODECS: Final = {"flac", "mp3", "mp3float", "aac", "alac", "vorbis", "opus", "libopus"} | {
    name for name in av.codecs_available if name.startswith("pcm_")
}
"""The codecs of voice recorders. FFmpeg must not use any other, not even while it looks into a file:
two megabytes of cover art unpack to two gigabytes."""


class InvalidAudioError(Exception):
    """The recording cannot be used; the message is a clause without a capital that tells the client why."""


def decode_reference(data: bytes) -> bytes:
    """The recording in `data` (wav flac mp3 ogg aac m4a webm …) as 24 kHz mono int16 little-endian PCM.

    Decoding ends at MAX_RECORDING_S, so that a small file cannot become a large one.
    Raises InvalidAudioError if the recording is too short, too long, silent, incomplete, or no audio.
    """
    if len(data) > MAX_REFERENCE_BYTES:
        raise InvalidAudioError(f"the recording is larger than {MAX_REFERENCE_BYTES // 2**20} MiB")
    demuxer = _demuxer_of(data)
    if demuxer is None:
        raise InvalidAudioError("this is not an audio file of a known kind (wav, flac, mp3, ogg, m4a, webm)")
    try:
        pcm, declared_s = _decode(data, demuxer, bytes_for(MAX_RECORDING_S))
    except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise InvalidAudioError("the recording is damaged or incomplete and cannot be decoded") from error
    seconds = seconds_of(pcm)
    if declared_s is not None and seconds < declared_s - _MAX_MISSING_S:
        raise InvalidAudioError(f"the recording is cut off: {declared_s:.1f} s by its header, {seconds:.1f} s in fact")
    if problem := length_problem(seconds):
        raise InvalidAudioError(problem)
    if max(map(abs, array.array("h", pcm)), default=0) < _SILENCE:
        raise InvalidAudioError("the recording is silent")
    return pcm


def _demuxer_of(data: bytes) -> str | None:
    """FFmpeg's name of the container by the first bytes; None for an unknown one."""
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


def _decode(data: bytes, demuxer: str, max_bytes: int) -> tuple[bytes, float | None]:
    """The PCM, cut a little after `max_bytes`, and the seconds that the recording's header declares."""
    if demuxer == "mov" and _declared_samples(data) > len(data):
        raise InvalidAudioError("the recording is damaged: it declares more samples than it has bytes")
    options = {
        "protocol_whitelist": "none",
        "format_whitelist": demuxer,
        "codec_whitelist": ",".join(_CODECS),
        "max_streams": str(_MAX_STREAMS),
    }
    pcm = bytearray()
    with av.open(io.BytesIO(data), "r", format=demuxer, options=options, io_open=_open_nothing) as container:
        if not container.streams.audio:
            raise InvalidAudioError("the file has no audio in it")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec.name not in _CODECS:
            raise InvalidAudioError(f"recordings in the codec {codec.name} are not supported")
        if codec.sample_rate not in _SAMPLE_RATES or not 1 <= codec.channels <= _MAX_CHANNELS:
            raise InvalidAudioError(
                f"a recording with {codec.sample_rate} Hz and {codec.channels} channels is not supported"
            )
        codec.thread_count = 1
        declared_s = _declared_seconds(data, demuxer, container)
        resampler = av.AudioResampler("s16", "mono", SAMPLE_RATE)
        for frame in container.decode(stream):
            for piece in resampler.resample(frame):
                pcm += bytes(piece.planes[0])[: piece.samples * BYTES_PER_SAMPLE]
            if len(pcm) > max_bytes:
                return bytes(pcm), None
        for piece in resampler.resample(None):
            pcm += bytes(piece.planes[0])[: piece.samples * BYTES_PER_SAMPLE]
    return bytes(pcm), declared_s


def _declared_seconds(data: bytes, demuxer: str, container: "InputContainer") -> float | None:
    """The length in the recording's own header; None if it has none, where FFmpeg would only estimate."""
    stream = container.streams.audio[0]
    if demuxer == "wav":
        return _wav_seconds(data)
    if demuxer == "matroska":
        return _matroska_seconds(container)
    has_header = demuxer in {"flac", "mov", "aiff"} or (demuxer == "mp3" and _has_frame_count(data))
    return float(stream.duration * stream.time_base) if has_header and stream.duration and stream.time_base else None


def _wav_seconds(data: bytes) -> float | None:
    """The length in a WAV header; None if the header was written before the length was known."""
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
    """The length in the audio track's tag; without a tag, the file's length if it has no other track."""
    tag = _DURATION.match(container.streams.audio[0].metadata.get("DURATION", ""))
    if tag:
        return 3600 * int(tag["hours"]) + 60 * int(tag["minutes"]) + float(tag["seconds"])
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return None


def _has_frame_count(data: bytes) -> bool:
    """True if the first frame of an MP3 file, after any tags, has the number of frames (the Xing header)."""
    start = 0
    if data[:3] == b"ID3":
        start = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    frame = data[start : start + _FIRST_FRAME_BYTES]
    return b"Xing" in frame or b"Info" in frame


def _declared_samples(data: bytes) -> int:
    """The samples in the largest size table of an MP4 file; each of them is one byte at least."""
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
    """The name of each MP4 box between two positions, and the start and end of its content."""
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
    raise PermissionError("a recording must not open other files")


def main() -> int:
    """Decode stdin to stdout within the limits; returns the exit code, 0 or REFUSED."""
    limits = ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_CORE, 0))
    for kind, limit in limits:
        _, hard = resource.getrlimit(kind)
        allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (allowed, allowed))
    code = 0
    try:
        output = decode_reference(sys.stdin.buffer.read())
    except InvalidAudioError as error:
        output, code = str(error).encode(), REFUSED
    sys.stdout.buffer.write(output)
    return code


if __name__ == "__main__":
    sys.exit(main())
