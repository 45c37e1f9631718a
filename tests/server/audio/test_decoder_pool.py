"""DecoderPool: few processes at a time, which end with their request; each failure is an error of the contract."""

import asyncio
import base64
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.app import create_app
from server.audio.decoder_pool import MAX_PROCESSES, MAX_WAITING, DecoderPool
from server.audio.encoder import Encoder
from server.http.errors import ApiError
from shared.pcm import seconds_of
from shared.protocol import LimitName
from shared.settings import Settings
from tests.audio import tone
from tests.server.running import becomes, listening, plain_client

WAITING_DECODER = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
os.write(log, f"+{os.getpid()} ".encode())
data = sys.stdin.buffer.read()
os.read(os.open(sys.argv[2], os.O_RDONLY), 1)
os.write(log, f"-{os.getpid()} ".encode())
sys.stdout.buffer.write(data)
"""
"""A decoder that returns its input once it has read a byte from the gate; it logs its start and its end."""


class Gate:
    """A pipe that decoders wait at, and their log."""

    def __init__(self, directory: Path) -> None:
        self._log, gate = directory / "log", directory / "gate"
        self._log.touch()
        os.mkfifo(gate)
        self._gate = os.open(gate, os.O_RDWR)
        self.command = [sys.executable, "-c", WAITING_DECODER, str(self._log), str(gate)]

    def open(self, count: int) -> None:
        """Let `count` decoders finish."""
        os.write(self._gate, bytes(count))

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._gate)

    def events(self) -> list[int]:
        """In order: the process id of each decoder that started, and its negative when it ended."""
        return [int(event) for event in self._log.read_text().split()]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A gate that lets no decoder through."""
    made = Gate(tmp_path)
    yield made
    made.close()


def pool_of(script: str) -> DecoderPool:
    """A pool whose decoder is a Python script."""
    return DecoderPool(allow_urls=False, command=[sys.executable, "-c", script])


@pytest.mark.slow
async def test_a_recording_becomes_pcm() -> None:
    """Base64, a data URL and an upload give the same PCM, decoded by the program."""
    pool = DecoderPool(allow_urls=False)
    encoder = Encoder("flac")
    file = encoder.feed(tone(2.5)) + encoder.finish()
    pcm = await pool.decode(file, "audio_sample")
    assert seconds_of(pcm) == pytest.approx(2.5, abs=0.07)
    text = base64.b64encode(file).decode()
    assert await pool.decode_ref_audio(text) == await pool.decode_ref_audio(f"data:audio/flac;base64,{text}") == pcm


@pytest.mark.parametrize(
    ("ref_audio", "code", "said"),
    [
        ("AAAA", "invalid_audio", "this is not an audio file"),
        ("no base64!", "invalid_audio", "neither a data URL nor base64"),
        ("data:audio/wav,x", "invalid_audio", "must hold base64"),
        (base64.b64encode(bytes(10 * 2**20 + 1)).decode(), "invalid_audio", "larger than 10 MiB"),
        ("https://site.test/voice.wav", "invalid_value", "URLs are not fetched here"),
    ],
    ids=range(5),
)
async def test_wrong_recordings_are_refused(ref_audio: str, code: str, said: str) -> None:
    """The error names the field and the reason."""
    with pytest.raises(ApiError, match=said) as refusal:
        await DecoderPool(allow_urls=False).decode_ref_audio(ref_audio)
    assert (refusal.value.code, refusal.value.param) == (code, "ref_audio")


@pytest.mark.parametrize(
    "script",
    ["import os; os.kill(os.getpid(), 9)", "import sys; sys.stderr.close(); sys.exit(1)", "import os; os.abort()"],
    ids=["killed", "failed", "aborted"],
)
async def test_a_decoder_that_dies_is_an_invalid_recording(script: str) -> None:
    """A decoder that is killed or crashes means `invalid_audio`, not an error of the server."""
    with pytest.raises(ApiError, match="damaged") as refusal:
        await pool_of(f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {script}").decode(b"x", "a")
    assert (refusal.value.code, refusal.value.status, refusal.value.param) == ("invalid_audio", 400, "a")


async def test_a_decoder_has_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a decoder has no TTS_* variable, so no key."""
    monkeypatch.setenv("TTS_API_KEYS", "secret")
    environ = await pool_of("import os; print(sorted(os.environ))").decode(b"", "a")
    assert b"PATH" in environ
    assert b"TTS_" not in environ


async def test_a_few_at_a_time(gate: Gate) -> None:
    """The third decoder starts when one of the first two has ended; each request gets its own PCM."""
    pool = DecoderPool(allow_urls=False, command=gate.command)
    work = [asyncio.create_task(pool.decode(bytes([number]), "a")) for number in range(5)]
    await becomes(lambda: len(gate.events()) == MAX_PROCESSES)
    gate.open(5)
    assert await asyncio.gather(*work) == [bytes([number]) for number in range(5)]
    running = 0
    for event in gate.events():
        running += 1 if event > 0 else -1
        assert running <= MAX_PROCESSES


async def test_too_many_recordings_are_refused(gate: Gate) -> None:
    """A recording beyond the limit is a 429 at once; when others have ended it is accepted."""
    limit_hits: Counter[LimitName] = Counter()
    pool = DecoderPool(allow_urls=False, command=gate.command, limit_hits=limit_hits)
    work = [asyncio.create_task(pool.decode(b"x", "a")) for _ in range(MAX_PROCESSES + MAX_WAITING)]
    await becomes(lambda: len(gate.events()) == MAX_PROCESSES)
    with pytest.raises(ApiError, match="too many recordings") as refusal:
        await pool.decode(b"x", "a")
    assert (refusal.value.code, refusal.value.status) == ("queue_full", 429)
    assert refusal.value.retry_after_s
    assert limit_hits == {"recordings": 1}
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    gate.open(1)
    assert await pool.decode(b"x", "a") == b"x"


async def test_fetching_is_bounded_too() -> None:
    """Recordings that are being fetched count too; a cancelled request cancels its fetch and makes room."""
    fetching: set[str] = set()

    async def fetch(url: str) -> bytes:
        fetching.add(url)
        try:
            return await asyncio.Future()
        finally:
            fetching.remove(url)

    pool = DecoderPool(allow_urls=True, fetch=fetch)
    urls = [f"https://site.test/{number}" for number in range(MAX_PROCESSES + MAX_WAITING)]
    work = [asyncio.create_task(pool.decode_ref_audio(url)) for url in urls]
    await becomes(lambda: len(fetching) == len(urls))
    for further in ("https://site.test/more", "AAAA"):
        with pytest.raises(ApiError, match="too many recordings"):
            await pool.decode_ref_audio(further)
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    assert not fetching
    with pytest.raises(ApiError, match="not an audio file"):
        await pool.decode_ref_audio("AAAA")


async def test_a_cancelled_request_ends_its_process(gate: Gate) -> None:
    """The decoder of a cancelled request is killed."""
    pool = DecoderPool(allow_urls=False, command=gate.command)
    work = asyncio.create_task(pool.decode(b"x", "a"))
    await becomes(gate.events)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not exists(gate.events()[0])


@pytest.mark.slow
async def test_a_disconnect_ends_the_process(gate: Gate, tmp_path: Path) -> None:
    """When an HTTP client disconnects, its decoder is killed."""
    app = create_app(Settings(worker_url=f"ipc://{tmp_path}/nobody.ipc"))
    async with listening(app) as base_url, plain_client(base_url) as client:
        app.app.state.decoder_pool = DecoderPool(allow_urls=False, command=gate.command)
        form = {"data": {"name": "me"}, "files": {"audio_sample": b"x"}}
        sending = asyncio.create_task(client.post("/v1/audio/voices", **form))
        await becomes(gate.events)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await becomes(lambda: not exists(gate.events()[0]))


@pytest.mark.slow
async def test_a_decoder_times_out(gate: Gate) -> None:
    """A decoder that takes too long is killed and the request gets a 429: processor time has its own limit."""
    with pytest.raises(ApiError, match="too busy") as refusal:
        await DecoderPool(allow_urls=False, command=gate.command, timeout_s=0.5).decode(b"x", "a")
    assert refusal.value.code == "queue_full"
    assert not any(map(exists, gate.events()))


async def test_a_decoder_that_cannot_start() -> None:
    """A machine that cannot start a process is busy: a 429."""
    with pytest.raises(ApiError, match="just now") as refusal:
        await DecoderPool(allow_urls=False, command=["/nowhere"]).decode(b"x", "a")
    assert refusal.value.code == "queue_full"


def exists(pid: int) -> bool:
    """True if there is a process with this id."""
    return Path(f"/proc/{pid}").exists()
