"""Recordings that clients send, or name by URL: bounded, checked and brought to 24 kHz mono int16 PCM.

It owns everything that touches untrusted audio. Containers and codecs are those of a short list, the demuxer is chosen
here by the first bytes (FFmpeg never guesses, so playlists and the like cannot come up), and FFmpeg opens nothing.
"""

import array
import asyncio
import http.client
import io
import ipaddress
import socket
import ssl
import struct
import urllib.parse
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn

import av
import av.error

from shared.pcm import BYTES_PER_SAMPLE, SAMPLE_RATE, bytes_for, seconds_of

if TYPE_CHECKING:
    from av.container import InputContainer

MAX_REFERENCE_BYTES: Final = 10 * 2**20
FETCH_TIMEOUT_S: Final = 15.0

_MAX_REDIRECTS: Final = 3
_MAX_STREAMS: Final = 8
_MAX_CHANNELS: Final = 8
_SAMPLE_RATES: Final = range(8_000, 192_001)
_SILENCE: Final = 66
"""0.2 per cent of full scale (-54 dB): a recording that stays below holds no voice."""
_TRUNCATED_BY_S: Final = 0.5
"""How much less than its header says a recording may hold; encoders' delays and rounded headers stay well below."""
_UNKNOWN_WAV_SIZE: Final = 0x7FFF_0000
"""Sizes from here on stand for a WAV that was streamed."""
_HEADER_BYTES: Final = 64 * 1024
"""What an HTTP answer may hold beside its body: header lines and the marks of chunks."""

_CODECS: Final = {"flac", "mp3", "mp3float", "aac", "alac", "vorbis", "opus", "libopus", "libvorbis"}
"""Beside pcm_*: what voice recorders write. Everything else FFmpeg could decode stays out of reach."""

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_6TO4: Final = ipaddress.ip_network("2002::/16")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


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


def fetch_reference(
    url: str,
    *,
    max_bytes: int = MAX_REFERENCE_BYTES,
    timeout_s: float = FETCH_TIMEOUT_S,
    resolve: "Callable[[str, int], Sequence[str]] | None" = None,
    may_connect: "Callable[[Address], bool] | None" = None,
) -> bytes:
    """What an http(s) URL of the public internet answers with, at most `max_bytes` in `timeout_s`. Blocks.

    Every hop's name is resolved once, all its addresses are checked, and the checked address is the one connected to:
    neither a redirect nor a changing DNS answer leads into a private network.
    Raises InvalidAudioError. `resolve` and `may_connect` are there for tests.
    """
    work = _fetch(url, max_bytes, resolve or _resolve, may_connect or is_public)
    try:
        return asyncio.run(asyncio.wait_for(work, timeout_s))
    except TimeoutError:
        raise InvalidAudioError(f"the URL did not answer completely within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException, asyncio.IncompleteReadError) as error:
        raise InvalidAudioError("the URL cannot be fetched") from error


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, also where it carries an IPv4 one inside."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64 or address in _6TO4 or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast


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
    options = {"protocol_whitelist": "none", "format_whitelist": demuxer, "max_streams": str(_MAX_STREAMS)}
    pcm = bytearray()
    with av.open(io.BytesIO(data), "r", format=demuxer, options=options, io_open=_open_nothing) as container:
        if not container.streams.audio:
            raise InvalidAudioError("the file holds no audio")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec.name not in _CODECS and not codec.name.startswith("pcm_"):
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
        return container.duration / av.time_base if container.duration else None
    has_header = demuxer in {"flac", "mov", "aiff"} or (
        demuxer == "mp3" and any(mark in data[:_HEADER_BYTES] for mark in (b"Xing", b"Info"))
    )
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


def _open_nothing(*_arguments: Any) -> NoReturn:
    raise PermissionError("a recording has no other files")


async def _fetch(
    url: str,
    max_bytes: int,
    resolve: Callable[[str, int], Sequence[str]],
    may_connect: Callable[[Address], bool],
) -> bytes:
    for _ in range(_MAX_REDIRECTS + 1):
        answer = await _get(url, max_bytes, resolve, may_connect)
        location = answer.getheader("Location")
        if answer.status in {301, 302, 303, 307, 308} and location:
            url = urllib.parse.urljoin(url, location)
            continue
        if answer.status != http.client.OK:
            raise InvalidAudioError(f"the URL answers with HTTP {answer.status}")
        body = answer.read()
        if len(body) > max_bytes:
            raise InvalidAudioError(f"the recording is larger than {max_bytes / 2**20:g} MiB")
        return body
    raise InvalidAudioError(f"the URL redirects more than {_MAX_REDIRECTS} times")


async def _get(
    url: str,
    max_bytes: int,
    resolve: Callable[[str, int], Sequence[str]],
    may_connect: Callable[[Address], bool],
) -> http.client.HTTPResponse:
    """One hop: the whole answer, read into memory and only then understood."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError) as error:
        raise InvalidAudioError("this is no http(s) URL") from error
    if not host or parts.username is not None:
        raise InvalidAudioError("this is no http(s) URL of a recording")
    addresses = await asyncio.to_thread(resolve, host, port)
    if not addresses or not all(may_connect(ipaddress.ip_address(address)) for address in addresses):
        raise InvalidAudioError("the URL is not one of the public internet")
    target = urllib.parse.quote(
        urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), safe="/?&=%:+,;@!$'()*~"
    )
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    reader, writer = await asyncio.open_connection(addresses[0], port, ssl=tls, server_hostname=host if tls else None)
    try:
        named = f"[{host}]" if ":" in host else host
        # HTTP/1.0, so that the end of the connection is the end of the answer.
        writer.write(f"GET {target} HTTP/1.0\r\nHost: {named}:{port}\r\nAccept: audio/*\r\n\r\n".encode("ascii"))
        received = bytearray()
        while piece := await reader.read(65_536):
            received += piece
            if len(received) > max_bytes + _HEADER_BYTES:
                raise InvalidAudioError(f"the recording is larger than {max_bytes / 2**20:g} MiB")
    finally:
        writer.close()
    answer = http.client.HTTPResponse(_Received(bytes(received)))  # type: ignore[arg-type]  # all it does is makefile
    answer.begin()
    return answer


def _resolve(host: str, port: int) -> list[str]:
    """Every address of `host`, in the resolver's order."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class _Received:
    """What http.client reads an answer from: bytes that have already arrived."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> IO[bytes]:
        return io.BytesIO(self._data)
