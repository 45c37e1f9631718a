"""Recordings of strangers: what is speech comes through, everything else is refused and opens nothing."""

import array
import contextlib
import io
import itertools
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import av
import pytest
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream

from server.encoding import Encoder, Format
from server.references import (
    MAX_REFERENCE_BYTES,
    Address,
    InvalidAudioError,
    decode_reference,
    fetch_reference,
    is_public,
)
from shared.pcm import SAMPLE_RATE, samples_of, seconds_of
from tests.audio import peak, tone

VOICE = tone(2.5, fade_s=0.01)


def file_of(container: str, codec: str, rate: int = 44_100, layout: str = "stereo", pcm: bytes = VOICE) -> bytes:
    """`pcm` as somebody else's encoder writes it."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
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


def of_ours(audio_format: Format, *, streaming: bool = False) -> bytes:
    """A file that this server itself has written."""
    encoder = Encoder(audio_format, streaming=streaming)
    return encoder.feed(VOICE) + encoder.finish()


FILES: dict[str, bytes] = {
    "wav": file_of("wav", "pcm_s16le"),
    "wav-24bit-96k": file_of("wav", "pcm_s24le", 96_000),
    "wav-ulaw-8k": file_of("wav", "pcm_mulaw", 8_000, "mono"),
    "flac": file_of("flac", "flac", 48_000),
    "mp3": file_of("mp3", "libmp3lame"),
    "ogg-opus": file_of("ogg", "libopus", 48_000),
    "m4a": file_of("ipod", "aac"),
    "m4a-alac": file_of("ipod", "alac"),
    "webm": file_of("webm", "libopus", 48_000),
    "aiff": file_of("aiff", "pcm_s16be"),
    "our-streamed-wav": of_ours("wav", streaming=True),
    "our-streamed-mp3": of_ours("mp3", streaming=True),
    "our-aac": of_ours("aac"),
}
TELL_THEIR_LENGTH = ["wav", "wav-24bit-96k", "wav-ulaw-8k", "flac", "mp3", "m4a", "m4a-alac", "webm", "aiff"]


def decoded(data: bytes, *, min_seconds: float = 1, max_seconds: float = 60) -> bytes:
    """What the service would keep of `data`."""
    return decode_reference(data, min_seconds=min_seconds, max_seconds=max_seconds)


@pytest.mark.parametrize("name", FILES)
def test_recordings_come_through(name: str) -> None:
    """Every kind of file becomes 24 kHz mono PCM of the right length, level and pitch."""
    pcm = decoded(FILES[name])
    assert seconds_of(pcm) == pytest.approx(2.5, abs=0.07)
    assert 5_500 < peak(pcm) < 11_500  # FFmpeg makes two channels of one 3 dB quieter
    inside = array.array("h", pcm)[SAMPLE_RATE // 2 : SAMPLE_RATE * 2]
    rising = sum(before < 0 <= after for before, after in itertools.pairwise(inside))
    assert rising == pytest.approx(1.5 * 300, abs=2)


@pytest.mark.parametrize("name", TELL_THEIR_LENGTH)
def test_truncated_files_are_refused(name: str) -> None:
    """A file that lost its second half is not taken for a shorter recording."""
    with pytest.raises(InvalidAudioError, match=r"cut off|damaged or incomplete"):
        decoded(FILES[name][: len(FILES[name]) // 2])


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
def test_what_is_no_audio_is_refused(data: bytes) -> None:
    """Text, pictures, playlists, noise and bare headers are an error that says so."""
    with pytest.raises(
        InvalidAudioError, match=r"no audio|damaged or incomplete|too short|sample_rate|is not a recording"
    ):
        decoded(data)


def test_codecs_off_the_list_are_refused() -> None:
    """FFmpeg's hundreds of other decoders stay out of reach."""
    with pytest.raises(InvalidAudioError, match="recordings in ac3 are not understood"):
        decoded(file_of("matroska", "ac3", 48_000))


@pytest.mark.parametrize("rate", [4_000, 384_000])
def test_odd_sample_rates_are_refused(rate: int) -> None:
    """What no voice was recorded at is refused before it is resampled."""
    with pytest.raises(InvalidAudioError, match="not a recording of a voice"):
        decoded(file_of("wav", "pcm_s16le", rate))


def test_too_short() -> None:
    """The message says how long it was and how long it must be."""
    with pytest.raises(InvalidAudioError, match=r"too short: 2\.50 s, at least 3 s"):
        decoded(FILES["wav"], min_seconds=3)


def test_too_long() -> None:
    """A recording over the limit is refused, not cut."""
    with pytest.raises(InvalidAudioError, match="longer than 2 s"):
        decoded(FILES["flac"], max_seconds=2)


def test_small_files_do_not_become_large() -> None:
    """Ten minutes of silence in half a megabyte of FLAC: decoding ends at the limit, and so does what it takes."""
    encoder = Encoder("flac")
    bomb = encoder.feed(bytes(600 * SAMPLE_RATE * 2)) + encoder.finish()
    assert len(bomb) < 600_000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidAudioError, match="longer than 5 s"):
            decoded(bomb, max_seconds=5)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * 2**20  # ten minutes are 28 MB


def test_too_many_bytes() -> None:
    """Over 10 MiB nothing is even looked at."""
    with pytest.raises(InvalidAudioError, match="larger than 10 MiB"):
        decoded(FILES["wav"] + bytes(MAX_REFERENCE_BYTES))


@pytest.mark.parametrize("amplitude", [0.0, 40.0])
def test_silence_is_refused(amplitude: float) -> None:
    """A muted microphone gives no voice."""
    with pytest.raises(InvalidAudioError, match="silent"):
        decoded(file_of("wav", "pcm_s16le", SAMPLE_RATE, "mono", tone(2.0, amplitude=amplitude)))


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "ogg-opus", "m4a", "webm"])
def test_damaged_files_are_an_error_or_audio(name: str) -> None:
    """However bytes are changed, the answer is bounded PCM or an InvalidAudioError, never anything else."""
    chance = random.Random(name)  # noqa: S311 - a test's dice
    for _ in range(40):
        data = bytearray(FILES[name])
        for _ in range(chance.choice([1, 4, 64])):
            data[chance.randrange(min(len(data), chance.choice([64, 4_096, len(data)])))] = chance.randrange(256)
        with contextlib.suppress(InvalidAudioError):
            assert seconds_of(decoded(bytes(data), max_seconds=5)) <= 5


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),  # noqa: S104 - nothing is bound
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:  # noqa: FBT001 - a column of the table above
    """Only addresses of the public internet are connected to, whatever they are wrapped in."""
    assert is_public(ip_address(address)) is public


@pytest.fixture
def site() -> Iterator[tuple[str, list[str]]]:
    """A web site on the loopback, and the paths that were asked of it."""
    asked: list[str] = []

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/never":
                released.wait(10)
                return
            self.send_response(302 if self.path.startswith(("/to?", "/loop")) else 404 if self.path == "/gone" else 200)
            if self.path.startswith("/to?"):
                self.send_header("Location", self.path.removeprefix("/to?"))
            if self.path == "/loop":
                self.send_header("Location", "/loop")
            if self.path == "/short":
                self.send_header("Content-Length", "1000")
            self.end_headers()
            size = {"/voice": 5_000, "/short": 10, "/large": 2_000_000}.get(self.path, 0)
            self.wfile.write(bytes(size))

        def log_message(self, *_arguments: object) -> None:
            """Quietly."""

    released = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://site.test:{server.server_port}", asked
    released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(
    url: str,
    *,
    resolve: Callable[[str, int], Sequence[str]] = lambda _host, _port: ["127.0.0.1"],
    may_connect: Callable[[Address], bool] = lambda address: str(address) == "127.0.0.1",
    max_bytes: int = 100_000,
    timeout_s: float = 5.0,
) -> bytes:
    """Fetch from the site as if the loopback were public."""
    return fetch_reference(url, max_bytes=max_bytes, timeout_s=timeout_s, resolve=resolve, may_connect=may_connect)


def test_a_url_is_fetched(site: tuple[str, list[str]]) -> None:
    """The body of an answer, also behind a redirect."""
    url, asked = site
    assert fetched(f"{url}/voice") == bytes(5_000)
    assert fetched(f"{url}/to?/voice") == bytes(5_000)
    assert asked == ["/voice", "/to?/voice", "/voice"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/large", "larger than"),
        ("/gone", "HTTP 404"),
        ("/loop", "redirects more than 3 times"),
        ("/short", "cannot be fetched"),
        ("/to?ftp://site.test/voice", r"no http\(s\) URL"),
        ("/to?file:///etc/passwd", r"no http\(s\) URL"),
    ],
)
def test_bad_answers_are_refused(site: tuple[str, list[str]], path: str, said: str) -> None:
    """Too much, nothing, a loop, half of it, another protocol: each is an error of the recording."""
    with pytest.raises(InvalidAudioError, match=said):
        fetched(site[0] + path)


def test_a_silent_server_is_left(site: tuple[str, list[str]]) -> None:
    """The limit of time holds for the whole fetch."""
    with pytest.raises(InvalidAudioError, match=r"within 0\.2 s"):
        fetched(f"{site[0]}/never", timeout_s=0.2)


def test_private_addresses_are_never_asked(site: tuple[str, list[str]]) -> None:
    """By name or number, directly or after a redirect: a private address is refused and nothing is sent to it."""
    url, asked = site
    port = url.rpartition(":")[2]
    for target in (f"http://127.0.0.1:{port}/voice", f"http://localhost:{port}/voice", f"http://[::1]:{port}/voice"):
        with pytest.raises(InvalidAudioError, match="not one of the public internet"):
            fetch_reference(target, timeout_s=5)
    assert asked == []
    names = {"site.test": ["127.0.0.1"], "inside.test": ["10.0.0.1"]}
    with pytest.raises(InvalidAudioError, match="not one of the public internet"):
        fetched(f"{url}/to?http://inside.test/voice", resolve=lambda host, _port: names[host])


def test_one_private_address_among_public_ones_is_enough(site: tuple[str, list[str]]) -> None:
    """A name that also points inside is refused whole."""
    with pytest.raises(InvalidAudioError, match="not one of the public internet"):
        fetched(f"{site[0]}/voice", resolve=lambda _host, _port: ["127.0.0.1", "10.0.0.1"])


def test_the_checked_address_is_the_one_connected_to(site: tuple[str, list[str]]) -> None:
    """A name server that changes its mind is asked once for each hop, and never after the check."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    assert fetched(f"{site[0]}/voice", resolve=lambda _host, _port: next(answers)) == bytes(5_000)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://a:99999/",
        "ftp://site.test/",
        "http://user@site.test/",
        "http://[::1",
        "nonsense",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    """A URL that is none is an error of the recording, not of ours."""
    with pytest.raises(InvalidAudioError, match="no http"):
        fetched(url)


def test_a_url_cannot_write_headers(site: tuple[str, list[str]]) -> None:
    """Line breaks and spaces in a URL stay part of its path."""
    url, asked = site
    fetched(f"{url}/a b?c= d")
    assert asked == ["/a%20b?c=%20d"]
