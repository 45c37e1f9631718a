"""Unmodified clients, each in an environment of its own, and the services that they speak to.

`make clients` makes the environments: the clients need other versions of their packages than we do.
"""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

from tests.checkpoints import tiny
from tests.ports import free_port
from tests.system.service import ROOT, START_PAUSE_S, Service, eventually, running_service

HERE: Final = Path(__file__).parent
ENVIRONMENTS: Final = ROOT / ".cache" / "clients"
MODEL: Final = "qwen3-tts-0.6b-customvoice"
AGENTS: Final = ("livekit", "pipecat", "livekit_elevenlabs", "pipecat_elevenlabs")

Speak = Callable[..., "Speaking"]
"""The type of the fixture `speak`."""


class Heard(msgspec.Struct):
    """The result of a client: 16-bit mono PCM at `rate`, an error if it saw one, and the voices if it lists them."""

    pcm: bytes
    rate: int
    error: str
    voices: list[str] = []


class Speaking:
    """A client process that says one text."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        assert process.stdout is not None
        self._lines = process.stdout

    def wait_for_audio(self) -> None:
        """Return when the client has its first audio."""
        assert self._lines.readline() == "speaking\n", self._log.read_text()

    def result(self) -> Heard:
        """The client's result, at its end."""
        lines = list(self._lines)
        assert self._process.wait() == 0, self._log.read_text()
        return msgspec.json.decode(lines[-1], type=Heard)


def python_of(environment: str) -> Path:
    """The Python of one of the environments."""
    python = ENVIRONMENTS / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {environment} environment: `make clients` makes it, with Python 3.12 or newer for wyoming")
    return python


@pytest.fixture(scope="session")
def espeak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that speaks words."""
    with running_service(tmp_path_factory.mktemp("espeak")) as service:
        yield service


@pytest.fixture(scope="session")
def _qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    paths = f"{MODEL}={tiny('custom_voice').resolve()}"
    settings = {"DEFAULT_MODEL": MODEL, "DEFAULT_DEVICE": "cpu", "MODEL_PATHS": paths}
    with running_service(tmp_path_factory.mktemp("qwen"), **settings) as service:
        yield service


@pytest.fixture
def qwen(_qwen: Service) -> Service:
    """A service with a small Qwen3-TTS model, whose GPU worker a test may kill."""
    return _qwen.wait_ready()


@contextlib.contextmanager
def wyoming_server(service: Service, directory: Path) -> Iterator[int]:
    """The port of wyoming-openai's server, which asks `service` for its voices once, when it starts."""
    port = free_port()
    options = {"uri": f"tcp://127.0.0.1:{port}", "tts-openai-url": f"{service.url}/v1", "tts-streaming-models": "tts-1"}
    arguments = [text for name, value in options.items() for text in (f"--{name}", value)]
    log = directory / f"wyoming-{port}.log"
    with log.open("wb") as output:
        command = [python_of("wyoming"), "-m", "wyoming_openai", *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "Starting server" in log.read_text()

        eventually(ready, 60, "wyoming-openai ready", pause_s=START_PAUSE_S)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def speak(tmp_path: Path) -> Iterator[Speak]:
    """Let a client say a text: its name, the service, the text and its options; an agent has a model as well."""
    with contextlib.ExitStack() as stack:

        def started(client: str, service: Service, text: str, *options: str, model: str = "tts-1") -> Speaking:
            agent = client in AGENTS
            python = python_of("agents" if agent else "wyoming")
            target = [service.url, model] if agent else [str(stack.enter_context(wyoming_server(service, tmp_path)))]
            command = [python, str(HERE / f"{client}_client.py"), *target, text, *options]
            log = tmp_path / f"{client}.log"
            with log.open("wb") as errors:
                process = stack.enter_context(
                    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
                )
            stack.callback(process.kill)
            return Speaking(process, log)

        yield started


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    """The newest FFmpeg that the clients' environment has."""
    command = [python_of("agents"), "-c", "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
