"""Decoding processes: few at a time, gone with their request, and whatever becomes of them an error of the contract."""

import asyncio
import base64
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.audio.decoder_pool import AT_ONCE, MAX_WAITING, DecoderPool
from server.audio.encoder import Encoder
from server.http.errors import ApiError
from shared.pcm import seconds_of
from shared.settings import Settings
from tests.audio import tone
from tests.server.running import becomes, listening

PATIENT = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
os.write(log, f"+{os.getpid()} ".encode())
data = sys.stdin.buffer.read()
os.read(os.open(sys.argv[2], os.O_RDONLY), 1)
os.write(log, f"-{os.getpid()} ".encode())
sys.stdout.buffer.write(data)
"""
"""Decodes by handing back what it got, once there is a byte for it at the gate; the log says who came and went."""


class Gate:
    """What patient decoders wait at, and their log."""

    def __init__(self, directory: Path) -> None:
        self._log, gate = directory / "log", directory / "gate"
        self._log.touch()
        os.mkfifo(gate)
        self._gate = os.open(gate, os.O_RDWR)
        self.command = [sys.executable, "-c", PATIENT, str(self._log), str(gate)]

    def open(self, count: int) -> None:
        """Let `count` decoders go."""
        os.write(self._gate, bytes(count))

    def close(self) -> None:
        """Take the gate away."""
        os.close(self._gate)

    def steps(self) -> list[int]:
        """The process id of every one that came, and its negative once it went, in order."""
        return [int(step) for step in self._log.read_text().split()]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A closed gate."""
    made = Gate(tmp_path)
    yield made
    made.close()


def saying(script: str) -> DecoderPool:
    """Recordings whose decoder is a script."""
    return DecoderPool(allow_urls=False, command=[sys.executable, "-c", script])


async def test_a_recording_becomes_pcm() -> None:
    """In base64, in a data URL and as a file: the same PCM, through the program."""
    recordings = DecoderPool(allow_urls=False)
    encoder = Encoder("flac")
    file = encoder.feed(tone(2.5)) + encoder.finish()
    pcm = await recordings.pcm_of(file, "audio_sample")
    assert seconds_of(pcm) == pytest.approx(2.5, abs=0.07)
    text = base64.b64encode(file).decode()
    assert await recordings.pcm_in(text) == await recordings.pcm_in(f"data:audio/flac;base64,{text}") == pcm


@pytest.mark.parametrize(
    ("ref_audio", "code", "said"),
    [
        ("AAAA", "invalid_audio", "this is no audio file"),
        ("no base64!", "invalid_audio", "neither a data URL nor base64"),
        ("data:audio/wav,x", "invalid_audio", "must hold base64"),
        (base64.b64encode(bytes(10 * 2**20 + 1)).decode(), "invalid_audio", "larger than 10 MiB"),
        ("https://site.test/voice.wav", "invalid_value", "URLs are not fetched here"),
    ],
    ids=range(5),
)
async def test_what_is_no_recording_is_refused(ref_audio: str, code: str, said: str) -> None:
    """The error names the field and says why."""
    with pytest.raises(ApiError, match=said) as refusal:
        await DecoderPool(allow_urls=False).pcm_in(ref_audio)
    assert (refusal.value.code, refusal.value.param) == (code, "ref_audio")


@pytest.mark.parametrize(
    "script",
    ["import os; os.kill(os.getpid(), 9)", "import sys; sys.stderr.close(); sys.exit(1)", "import os; os.abort()"],
    ids=["killed", "failed", "aborted"],
)
async def test_a_decoder_that_dies_tells_of_a_bad_recording(script: str) -> None:
    """Killed at a limit or by its own fault: the client hears of its recording, not of a mistake of the server's."""
    with pytest.raises(ApiError, match="damaged") as refusal:
        await saying(f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {script}").pcm_of(b"x", "a")
    assert (refusal.value.code, refusal.value.status, refusal.value.param) == ("invalid_audio", 400, "a")


async def test_keys_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes strangers' files is not told this server's settings."""
    monkeypatch.setenv("TTS_API_KEYS", "secret")
    told = await saying("import os; print(sorted(os.environ))").pcm_of(b"", "a")
    assert b"PATH" in told
    assert b"TTS_" not in told


async def test_a_few_at_a_time(gate: Gate) -> None:
    """The third waits until one of the first two is gone, and everyone gets what is theirs."""
    recordings = DecoderPool(allow_urls=False, command=gate.command)
    work = [asyncio.create_task(recordings.pcm_of(bytes([number]), "a")) for number in range(5)]
    await becomes(lambda: len(gate.steps()) == AT_ONCE)
    gate.open(5)
    assert await asyncio.gather(*work) == [bytes([number]) for number in range(5)]
    running = 0
    for step in gate.steps():
        running += 1 if step > 0 else -1
        assert running <= AT_ONCE


async def test_too_many_are_told_to_come_back(gate: Gate) -> None:
    """When enough wait, another one is a 429 at once; when they are through it is welcome."""
    recordings = DecoderPool(allow_urls=False, command=gate.command)
    work = [asyncio.create_task(recordings.pcm_of(b"x", "a")) for _ in range(AT_ONCE + MAX_WAITING)]
    await becomes(lambda: len(gate.steps()) == AT_ONCE)
    with pytest.raises(ApiError, match="too many recordings") as refusal:
        await recordings.pcm_of(b"x", "a")
    assert (refusal.value.code, refusal.value.status) == ("queue_full", 429)
    assert refusal.value.retry_after_s
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    gate.open(1)
    assert await recordings.pcm_of(b"x", "a") == b"x"


async def test_fetching_is_bounded_too() -> None:
    """URLs that answer slowly count among those that wait; who leaves takes the fetch along and makes room."""
    fetching: set[str] = set()

    async def fetch(url: str) -> bytes:
        fetching.add(url)
        try:
            return await asyncio.Future()
        finally:
            fetching.remove(url)

    recordings = DecoderPool(allow_urls=True, fetch=fetch)
    urls = [f"https://site.test/{number}" for number in range(AT_ONCE + MAX_WAITING)]
    work = [asyncio.create_task(recordings.pcm_in(url)) for url in urls]
    await becomes(lambda: len(fetching) == len(urls))
    for further in ("https://site.test/more", "AAAA"):
        with pytest.raises(ApiError, match="too many recordings"):
            await recordings.pcm_in(further)
    for task in work:
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    assert not fetching
    with pytest.raises(ApiError, match="no audio file"):
        await recordings.pcm_in("AAAA")


async def test_a_cancelled_request_takes_its_process_along(gate: Gate) -> None:
    """Nobody decodes what nobody waits for, and the next one has its turn."""
    recordings = DecoderPool(allow_urls=False, command=gate.command)
    work = asyncio.create_task(recordings.pcm_of(b"x", "a"))
    await becomes(gate.steps)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not exists(gate.steps()[0])


async def test_a_client_that_leaves_takes_its_process_along(gate: Gate, tmp_path: Path) -> None:
    """Over HTTP: the process is gone soon after the connection is."""
    app = create_app(Settings(worker_url=f"ipc://{tmp_path}/nobody.ipc"))
    async with listening(app) as base_url, httpx.AsyncClient(base_url=base_url, timeout=20) as client:
        app.app.state.decoder_pool = DecoderPool(allow_urls=False, command=gate.command)
        form = {"data": {"name": "me"}, "files": {"audio_sample": b"x"}}
        sending = asyncio.create_task(client.post("/v1/audio/voices", **form))
        await becomes(gate.steps)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await becomes(lambda: not exists(gate.steps()[0]))


async def test_a_decoder_that_gets_nowhere_is_ended(gate: Gate) -> None:
    """Its processor time has a limit of its own, so the machine is busy: a 429, and no process stays."""
    with pytest.raises(ApiError, match="too much to do") as refusal:
        await DecoderPool(allow_urls=False, command=gate.command, timeout_s=0.5).pcm_of(b"x", "a")
    assert refusal.value.code == "queue_full"
    assert not any(map(exists, gate.steps()))


async def test_no_process_to_be_had() -> None:
    """A machine that starts no more processes is busy too."""
    with pytest.raises(ApiError, match="just now") as refusal:
        await DecoderPool(allow_urls=False, command=["/nowhere"]).pcm_of(b"x", "a")
    assert refusal.value.code == "queue_full"


def exists(pid: int) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{pid}").exists()
