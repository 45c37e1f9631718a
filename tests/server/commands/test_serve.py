"""`serve`: its checks before anything starts, and stopping. tests/system tests a running service."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.__main__ import main
from server.commands import serve
from server.reload.configuration import Configuration
from tests.ports import free_port
from tests.server.commands.conftest import CannedService

ROOT = str(Path(__file__).parents[3])


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Another program's socket, which shares its port as granian's workers do."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


def test_wrong_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One message names all mistakes, also those against catalogue, disk and GPU; the exit code is 2."""
    monkeypatch.chdir(tmp_path)
    wrong = {"PORT": "many", "DEFAULT_MODEL": "void", "VOICES_DIR": "/dev/null/voices", "DEFAULT_DEVICE": "cuda"}
    for name, value in wrong.items():
        monkeypatch.setenv(f"TTS_{name}", value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    assert main([]) == 2
    err = capfd.readouterr().err
    assert sorted(line.split(":")[0].strip() for line in err.splitlines()[1:]) == sorted(
        f"TTS_{name}" for name in wrong
    )


@pytest.mark.parametrize(
    ("command", "content"),
    [([], b"TTS_API_KEYS: secret\n"), (["models"], b"TTS_API_KEYS secret\n"), (["say", "Hello."], b"=secret\n")],
    ids=["serve", "models", "say"],
)
def test_a_wrong_dotenv(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    command: list[str],
    content: bytes,
) -> None:
    """A line of .env that cannot be read ends each command with exit code 2 and a sentence that names the line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(content)
    assert main(command) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert ".env line 1: " in err
    assert "Traceback" not in err
    assert "secret" not in err


def test_a_worker_elsewhere_needs_no_gpu_here(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With TTS_WORKER_URL, this machine needs neither a GPU nor the folders of the worker."""
    monkeypatch.chdir(tmp_path)
    settings = {"WORKER_URL": f"ipc://{tmp_path}/w.ipc", "VOICES_DIR": "/dev/null/voices", "DEFAULT_DEVICE": "cuda"}
    for name, value in (settings | {"PORT": str(listener.getsockname()[1])}).items():
        monkeypatch.setenv(f"TTS_{name}", value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([]) == 1
    assert "is in use" in capfd.readouterr().err


def test_a_port_in_use(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A port in use is refused before anything starts, even if the other program shares the port."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTS_PORT", str(listener.getsockname()[1]))
    assert main(["serve"]) == 1
    err = capfd.readouterr().err
    assert f"is in use by process {os.getpid()} (" in err
    assert "TTS_PORT" in err


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid", "http://localhost", "a..b"])
def test_an_address_that_is_not_ours(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A host that is not this machine's is a wrong setting, reported beside all others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTS_HOST", host)
    monkeypatch.setenv("TTS_DEFAULT_MODEL", "void")
    assert main([]) == 2
    err = capfd.readouterr().err
    assert f"TTS_HOST: {host!r} is no" in err
    assert "TTS_DEFAULT_MODEL" in err


def test_pronunciations_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file is a wrong setting, not a failure of the first request."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTS_PRONUNCIATIONS", "words.toml")
    assert main([]) == 2
    assert "TTS_PRONUNCIATIONS: words.toml cannot be read by" in capfd.readouterr().err
    (tmp_path / "words.toml").write_text('nginx = "engine X"')
    assert main([]) == 2
    assert "TTS_PRONUNCIATIONS: words.toml: " in capfd.readouterr().err


def test_no_room_for_the_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A TMPDIR that cannot be used, or whose path is too long for a socket, is one sentence that names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TTS_PORT", str(free_port()))
    monkeypatch.setattr(signal, "signal", lambda *_arguments: None)  # the command would set its own handlers
    long = tmp_path / ("x" * 100)
    long.mkdir()
    for folder, problem in [(tmp_path / "nowhere", "No such file"), (long, "longer than the 107 bytes")]:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        assert main([]) == 2
        err = capfd.readouterr().err
        assert problem in err
        assert "TMPDIR" in err


def test_the_current_folder_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A current folder that was deleted is one sentence."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main([]) == 2
    assert "the current folder cannot be used: No such file or directory" in capfd.readouterr().err


def test_a_full_disk_behind_stdout(service: CannedService) -> None:
    """A command whose output cannot be written says so in one sentence."""
    service.answers["/v1/models"] = (200, {"data": []})
    command = [sys.executable, "-m", "server", "models", "--url", service.url]
    with Path("/dev/full").open("wb") as full:
        environ = {**os.environ, "PYTHONPATH": ROOT}
        ended = subprocess.run(command, env=environ, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "stdin or stdout failed: No space left on device\n")


def test_help_is_helpful(capfd: pytest.CaptureFixture[str]) -> None:
    """The help has every command and examples."""
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capfd.readouterr().out
    for word in ("serve", "say", "models", "voices", "top", "examples:", "TTS_"):
        assert word in out


def test_an_unknown_command_is_refused() -> None:
    """An unknown command ends with the parser's exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["sing"])
    assert end.value.code == 2


def test_everything_is_gone_after_sigterm(tmp_path: Path) -> None:
    """SIGTERM ends the service with exit code 0; no child and no folder of the worker's socket is left."""
    port = free_port()
    environ = {**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(tmp_path), "TTS_PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "-m", "server"], cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True
    ) as service:
        assert service.stderr is not None
        lines = []
        for line in service.stderr:
            lines.append(line)
            if "worker_connected" in line:
                break
        assert [path.stat().st_mode & 0o777 for path in tmp_path.glob("tts-*")] == [0o700]
        service.send_signal(signal.SIGTERM)
        lines += service.stderr  # ends when the last process that holds it has
        assert service.wait() == 0
    said = "".join(lines)
    assert f"http://127.0.0.1:{port}/docs" in said
    assert said.index("Stopped worker-1") < said.index("drained")
    assert "Traceback" not in said
    assert list(tmp_path.glob("tts-*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_a_signal_during_the_start_is_not_lost(tmp_path: Path, number: signal.Signals) -> None:
    """A signal while the processes start ends the service at once, and nothing is left."""
    port = free_port()
    environ = {**os.environ, "PYTHONPATH": ROOT, "TMPDIR": str(tmp_path), "TTS_PORT": str(port)}
    with subprocess.Popen(
        [sys.executable, "-m", "server"], cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True
    ) as service:
        assert service.stderr is not None
        for line in service.stderr:
            if "Spawning worker-1" in line:
                break
        service.send_signal(number)
        assert service.wait(timeout=15) == 0  # half of what granian waits before it kills
        service.stderr.read()  # ends when the last process that holds it has
    assert list(tmp_path.glob("tts-*")) == []


@pytest.mark.parametrize("own", [None, "glibc.malloc.check=1"])
def test_the_gpu_worker_asks_for_huge_pages(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    """Unless the environment says something else to glibc."""

    class Started(Exception):  # noqa: N818 -- not an error
        pass

    def start(_command: list[str], environ: Callable[[], dict[str, str]], **_: object) -> None:
        raise Started(environ()["GLIBC_TUNABLES"])

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    monkeypatch.setattr(serve, "Supervisor", start)
    monkeypatch.setattr(serve, "_web_server", lambda *_: SimpleNamespace(signal_handler_interrupt=None))
    with pytest.raises(Started, match=own or "glibc.malloc.hugetlb=1"):
        serve._serve_with_worker(Configuration([], []), [], "ipc:///tmp/none/worker.ipc")
