"""Uploaded recordings are decoded here to 24 kHz mono int16 PCM, by the program `python -m server.audio.decoder`.

This module and file_kinds.py own everything that touches untrusted audio. They accept a short list of containers and
codecs. file_kinds.py chooses the demuxer by the first bytes, so FFmpeg never guesses and never meets a playlist.
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

from server.audio.file_kinds import SEND, InvalidAudioError, recognise
from shared.pcm import BYTES_PER_SAMPLE, SAMPLE_RATE, bytes_for, seconds_of
from shared.recordings import MAX_RECORDING_S, length_problem, silence_problem

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
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

_MAX_PADDING_S: Final = 0.5
"""A codec's padding makes a recording so much longer: two packets of AAC at 8 kHz are 0.26 s. It is cut off."""

_FIRST_FRAME_BYTES: Final = 64
"""The Xing header of an MP3 file is within these bytes of its first frame."""

_DURATION: Final = re.compile(r"(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d(?:\.\d*)?)")
"""A track's length in Matroska's tags."""

_BOXES_OF_BOXES: Final = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
"""The boxes of an MP4 file that lead to its tables of samples."""

_CODECS: Final = {
    *("flac", "mp3", "mp3float", "aac", "alac", "vorbis", "opus", "libopus"),
    *("amrnb", "amrwb", "libopencore_amrnb", "libopencore_amrwb", "adpcm_ima_wav", "adpcm_ima_qt", "adpcm_ms"),
    *(name for name in av.codecs_available if name.startswith("pcm_")),
}
"""The codecs of voice recorders and telephones. FFmpeg must not use any other, not even while it looks into a file:
two megabytes of cover art unpack to two gigabytes."""


def decode_reference(data: bytes) -> bytes:
    """The recording in `data` as 24 kHz mono int16 little-endian PCM.

    It may be wav, flac, mp3, ogg, m4a, aac, webm, and what else file_kinds.py and `_CODECS` list.
    Decoding ends soon after MAX_RECORDING_S, so that a small file cannot become a large one.
    Raises InvalidAudioError if the recording is too short, too long, silent, incomplete, or no audio.
    """
    if len(data) > MAX_REFERENCE_BYTES:
        raise InvalidAudioError(f"the recording is larger than {MAX_REFERENCE_BYTES // 2**20} MiB")
    demuxer, start = recognise(data)
    try:
        pcm, seconds, declared_s = _decode(data[start:], demuxer)
    except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise InvalidAudioError("the recording is damaged or incomplete and cannot be decoded") from error
    if declared_s is not None and seconds < declared_s - _MAX_MISSING_S:
        raise InvalidAudioError(f"the recording is cut off: {declared_s:.1f} s by its header, {seconds:.1f} s in fact")
    if seconds <= MAX_RECORDING_S + _MAX_PADDING_S:
        pcm = pcm[: bytes_for(MAX_RECORDING_S)]
        seconds = seconds_of(pcm)
    if problem := length_problem(seconds):
        raise InvalidAudioError(problem)
    samples = array.array("h", pcm)
    # The middle between the extremes is the offset that cheap sound cards add.
    if max(samples) - min(samples) < 2 * _SILENCE:
        raise InvalidAudioError(silence_problem(seconds))
    return pcm


def _decode(data: bytes, demuxer: str) -> tuple[bytes, float, float | None]:
    """The PCM, cut a little behind MAX_RECORDING_S; the seconds that there are; those that the header declares."""
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
        if codec is None:  # PyAV's types do not know that FFmpeg has no decoder of every codec
            raise InvalidAudioError(f"recordings in an unknown codec are not supported; {SEND}")
        if codec.name not in _CODECS:
            raise InvalidAudioError(f"recordings in the codec {codec.name} are not supported; {SEND}")
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
            if len(pcm) > bytes_for(MAX_RECORDING_S + _MAX_PADDING_S):
                return bytes(pcm), max(len(pcm) / bytes_for(1), _seconds_to_the_end(container, stream)), declared_s
        for piece in resampler.resample(None):
            pcm += bytes(piece.planes[0])[: piece.samples * BYTES_PER_SAMPLE]
    return bytes(pcm), len(pcm) / bytes_for(1), declared_s


def _seconds_to_the_end(container: "InputContainer", stream: "AudioStream") -> float:
    """The end of the last packet. Only the packets are read, because decoding hours of them takes too long."""
    end = 0
    for packet in container.demux(stream):
        end = max(end, (packet.pts or 0) + (packet.duration or 0))
    return float((end - (stream.start_time or 0)) * stream.time_base) if stream.time_base else 0.0


def _declared_seconds(data: bytes, demuxer: str, container: "InputContainer") -> float | None:
    """The length in the recording's own header; None if it has none, where FFmpeg would only estimate.

    The size in a WAV header counts for nothing: programs that stream write a size that is never reached.
    """
    stream = container.streams.audio[0]
    if demuxer == "matroska":
        return _matroska_seconds(container)
    has_header = demuxer in {"flac", "mov", "aiff"} or (demuxer == "mp3" and _has_frame_count(data))
    return float(stream.duration * stream.time_base) if has_header and stream.duration and stream.time_base else None


def _matroska_seconds(container: "InputContainer") -> float | None:
    """The length in the audio track's tag; without a tag, the file's length if it has no other track."""
    tag = _DURATION.match(container.streams.audio[0].metadata.get("DURATION", ""))
    if tag:
        return 3600 * int(tag["hours"]) + 60 * int(tag["minutes"]) + float(tag["seconds"])
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return None


def _has_frame_count(data: bytes) -> bool:
    """True if the first frame of MP3 has the number of frames (the Xing header)."""
    frame = data[:_FIRST_FRAME_BYTES]
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
