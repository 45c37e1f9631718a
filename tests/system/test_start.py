"""Starts of the service, and the settings with which it refuses to start."""

import contextlib
import fcntl
import os
import pwd
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server.processes import PortError, addresses_of, hold_port
from tests.ports import free_port
from tests.system.service import (
    Service,
    children_of,
    drop_privileges,
    environment,
    eventually,
    is_running,
    running_worker,
)


def run(module: str, directory: Path, *arguments: str, **settings: object) -> "subprocess.CompletedProcess[str]":
    """`python -m module` with these TTS_* variables, to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=directory,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        preexec_fn=drop_privileges,
    )


@pytest.mark.parametrize("module", ["server", "gpu_worker"])
def test_wrong_settings_are_named_all_at_once(tmp_path: Path, module: str) -> None:
    """Every mistake in one message, exit code 2, and no port was opened."""
    port = free_port()
    wrong = {"PORT": port, "DTYPE": "int3", "IDLE_TIMEOUT": "soon", "NO_SUCH_THING": 1, "API_KEYS": "a key"}
    ended = run(module, tmp_path, **wrong)
    assert ended.returncode == 2
    for name in ("TTS_DTYPE", "TTS_IDLE_TIMEOUT", "TTS_NO_SUCH_THING", "TTS_API_KEYS"):
        assert name in ended.stderr
    assert "a key" not in ended.stderr.replace("a key is", "")
    assert "Traceback" not in ended.stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_wrong_dotenv_is_one_sentence(tmp_path: Path) -> None:
    """The GPU worker's commands as well end with exit code 2 and a sentence, without the secret in the line."""
    (tmp_path / ".env").write_text("tts_worker_token=secret\n")
    ended = run("gpu_worker", tmp_path, "health", WORKER_URL=f"ipc://{tmp_path}/worker.ipc")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "did you mean TTS_WORKER_TOKEN?" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr


def test_of_two_starts_at_once_one_serves(tmp_path: Path) -> None:
    """Two starts in one moment on one port: one serves, on both loopbacks; the other one names its process and ends.

    Once the first is killed, the port is free.
    """
    port = free_port()
    settings = {"PORT": port, "WORKER_URL": f"ipc://{tmp_path}/worker.ipc"}
    starts: list[subprocess.Popen[bytes]] = []
    for host in ("localhost", "*"):
        command, variables = [sys.executable, "-m", "server"], environment(HOST=host, **settings)
        with (tmp_path / f"{len(starts)}.log").open("wb") as log:
            starts.append(subprocess.Popen(command, cwd=tmp_path, env=variables, stderr=log))
    try:
        eventually(lambda: any(start.poll() is not None for start in starts), 60, "one of two ends")
        loser, winner = sorted(starts, key=lambda start: start.poll() is None)
        assert loser.wait() == 1
        said = (tmp_path / f"{starts.index(loser)}.log").read_text()
        assert f"port {port} is in use by process {winner.pid} (" in said
        assert "Traceback" not in said
        for host in addresses_of("localhost"):
            url = f"http://[{host}]:{port}/health" if ":" in host else f"http://{host}:{port}/health"
            eventually(lambda url=url: answers(url), 60, f"{url} answers")
        assert winner.poll() is None
    finally:
        for start in starts:
            start.kill()
            start.wait()
    eventually(lambda: is_free(port), 60, "the port is free again")


def answers(url: str) -> bool:
    """True if the URL answers 200 now."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def is_free(port: int) -> bool:
    """True if a service could take the port now."""
    try:
        hold_port(["127.0.0.1"], port).close()
    except PortError:
        return False
    return True


def closed_folder(path: Path) -> Path:
    """A folder that this user may not enter."""
    path.mkdir()
    path.chmod(0)
    return path


def test_what_may_not_be_read_is_named_with_the_user(tmp_path: Path) -> None:
    """Folders of single models and of voices, the port and the file .env: what may not be used, and by which user."""
    user = f"{pwd.getpwuid(os.geteuid()).pw_name} (uid {os.geteuid()})"
    closed = closed_folder(tmp_path / "closed")
    ended = run("server", tmp_path, MODEL_PATHS=f"0.6b={closed}", VOICES_DIR=closed / "voices", HOST="no.such.invalid")
    assert ended.returncode == 2
    assert f"TTS_MODEL_PATHS: {closed} cannot be read by {user}: Permission denied" in ended.stderr
    assert f"TTS_VOICES_DIR: {closed / 'voices'} cannot be read by {user}: Permission denied" in ended.stderr
    assert "TTS_HOST: 'no.such.invalid' is no IP address" in ended.stderr
    ended = run("server", tmp_path, PORT=79, VOICES_DIR=tmp_path / "voices")
    assert ended.returncode == 2
    assert f"127.0.0.1 port 79 may not be listened on by {user}; choose" in ended.stderr
    (tmp_path / ".env").touch(mode=0)
    ended = run("gpu_worker", tmp_path, "health")
    assert ended.returncode == 2
    assert f".env cannot be read by {user}: Permission denied" in ended.stderr


def test_dotenv_and_a_closed_folder_of_models(tmp_path: Path) -> None:
    """Settings come from .env unless the environment has them as well.

    A TTS_MODELS_DIR that may not be read is one line of the log; espeak-ng speaks, and the GPU worker lives.
    """
    (tmp_path / ".env").write_text(f"TTS_PORT={free_port()}\nTTS_API_TITLE=From the file\nTTS_MAX_QUEUE=7\n")
    closed = closed_folder(tmp_path / "closed")
    service = Service(tmp_path, MAX_QUEUE=9, MODELS_DIR=closed, preexec_fn=drop_privileges)
    try:
        assert service.wait_ready().speech("Hello.").status_code == httpx.codes.OK
        config = service.http.get("/admin/config").json()
        qwen = next(model for model in service.http.get("/v1/models").json()["data"] if model["id"].startswith("qwen"))
        stats = service.stats()
        assert service.stop() == 0
    finally:
        service.kill()
    log = service.log.read_text()
    assert (config["api_title"], config["max_queue"], config["port"]) == ("From the file", 9, service.port)
    assert log.count(f"TTS_MODELS_DIR: {closed} cannot be read by ") == 1
    assert "Traceback" not in log
    assert f"{closed} cannot be read by " in qwen["detail"]
    assert stats["worker"]["restarts"] == 0


def test_worker_apart_from_the_server(tmp_path: Path, start: Callable[..., Service]) -> None:
    """With TTS_WORKER_URL the server starts no worker of its own and uses the one at that address.

    Settings of the worker are shown as the worker has them.
    A second GPU worker at the same address ends with exit code 3, and the first goes on.
    SIGHUP ends a GPU worker that runs alone, as SIGTERM does.
    """
    theirs = {"IDLE_TIMEOUT": 7, "CLEANUP_INTERVAL": 3, "CLEANUP_ENABLED": "false", "DEFAULT_DEVICE": "cpu"}
    with running_worker(tmp_path, **theirs) as (url, worker):
        assert run("gpu_worker", tmp_path, "health", WORKER_URL=url).returncode == 0
        assert run("gpu_worker", tmp_path, WORKER_URL=url).returncode == 3
        service = start(WORKER_URL=url, IDLE_TIMEOUT=9, MAX_INPUT_CHARS=50)
        assert service.worker_pid() == worker.pid
        assert service.speech("Hello.").status_code == 200
        config = service.http.get("/admin/config").json()
        assert (config["idle_timeout"], config["cleanup_interval"], config["cleanup_enabled"]) == (7, 3, False)
        # "auto" in both environments: the worker has resolved it.
        assert (config["default_device"], config["default_model"]) == ("cpu", "espeak-ng")
        assert (config["max_input_chars"], config["port"]) == (50, service.port)
        last = service.http.post("/admin/cleanup").json()
        assert (last["idle_timeout"], last["cleanup_interval"], last["status"]) == (7, 3, "disabled")
        assert service.stats()["worker"]["restarts"] == 0
        assert service.stop() == 0
        assert worker.poll() is None
        worker.send_signal(signal.SIGHUP)
        assert worker.wait(30) == 0


def test_a_closed_terminal_ends_the_service(tmp_path: Path) -> None:
    """The kernel's SIGHUP to all processes of the terminal lets the running stream end, and then ends them all."""
    terminal, theirs = os.openpty()

    def enter_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    service = Service(tmp_path, preexec_fn=enter_terminal).wait_ready()
    os.close(theirs)
    try:
        children = children_of(service.process.pid)
        with service.stream("One sentence. " * 40, response_format="wav") as answer:
            pieces = answer.iter_bytes()
            audio = next(pieces)
            os.close(terminal)
            audio += b"".join(pieces)
        assert len(audio) > 48_000 * 40  # a second each, at least
        assert service.process.wait(90) == 0
        assert not [pid for pid in children if is_running(pid)]
    finally:
        service.kill()


def test_nohup_keeps_the_service(tmp_path: Path) -> None:
    """A service that nohup started ignores SIGHUP in every process."""
    port = free_port()
    command = ["nohup", sys.executable, "-m", "server"]
    variables = environment(PORT=port, VOICES_DIR=tmp_path / "voices")
    with (tmp_path / "log").open("wb") as log:
        main = subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=log, stderr=log)
    try:
        eventually(lambda: answers(f"http://127.0.0.1:{port}/ready"), 90, "the service is ready")
        processes = {main.pid} | children_of(main.pid)
        assert len(processes) == 3
        for pid in processes:
            ignored = Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0]
            assert int(ignored, 16) & 1 << signal.SIGHUP - 1, pid
        main.terminate()
        assert main.wait(30) == 0
    finally:
        for pid in (*children_of(main.pid), main.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        main.wait()
