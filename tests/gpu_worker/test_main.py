"""The worker as a process: its settings, its address, its exit codes, its end."""

import functools
import importlib.util
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

import gpu_worker.__main__
from gpu_worker.__main__ import EXIT_ALREADY_RUNNING, EXIT_WRONG_SETTINGS, main
from gpu_worker.engines.factory import GPU_EXTRA
from gpu_worker.health import check
from gpu_worker.worker import Drain
from shared.environment import NO_CUDA
from shared.protocol import VERSION, Action, Call, CloneVoice, DeleteVoice, Hello, Reply, decode_from_worker, encode
from shared.sockets import AlreadyRunningError, claim, connect_dealer

WAIT_S = 30


class _Process:
    """Starts `python -m gpu_worker` in an empty directory, with its socket below it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"ipc://{directory}/run/worker.ipc"
        plain = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
        self.environment = plain | {
            "TTS_WORKER_URL": self.url,
            "TTS_DEFAULT_DEVICE": "cpu",
            "TTS_VOICES_DIR": str(directory / "voices"),
            "TTS_USAGE_FILE": str(directory / "usage.sqlite"),
        }

    def start(self, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "gpu_worker"],
            cwd=self.directory,
            env=self.environment | variables,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fails(self, **variables: str) -> tuple[int, str]:
        """Run a process that ends by itself; returns its exit code and stderr."""
        process = self.start(**variables)
        _, stderr = process.communicate(timeout=WAIT_S)
        return process.returncode, stderr


@pytest.fixture
def process(tmp_path: Path) -> _Process:
    """A worker process that is not started yet."""
    return _Process(tmp_path)


@pytest.fixture
def running(process: _Process) -> Iterator[subprocess.Popen[str]]:
    """A worker process that answers."""
    worker = process.start()
    try:
        assert check(process.url, "", timeout_s=WAIT_S) is None
        yield worker
    finally:
        worker.kill()
        worker.communicate()


class TestSettings:
    """Wrong settings, and commands that need none."""

    @pytest.fixture(autouse=True)
    def _clean(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in os.environ:
            if name.startswith("TTS_"):
                monkeypatch.delenv(name)
        monkeypatch.chdir(tmp_path)

    def test_every_mistake(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """All mistakes are named at once, those of .env too; the environment takes precedence."""
        (tmp_path / ".env").write_text("TTS_PORT=http\nTTS_LOG_LEVEL=loud\nTTS_MAX_QUEUE=\n")
        monkeypatch.setenv("TTS_IDLE_TIMEOUT", "never")
        monkeypatch.setenv("TTS_LOG_LEVEL", "info")
        assert main([]) == EXIT_WRONG_SETTINGS
        stderr = capsys.readouterr().err
        assert "TTS_PORT" in stderr
        assert "TTS_IDLE_TIMEOUT" in stderr
        assert "TTS_LOG_LEVEL" not in stderr

    def test_mistakes_of_every_kind(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """Mistakes that only the catalogue, the disk or the driver can show are in the same message."""
        wrong = {"PORT": "http", "DEFAULT_MODEL": "void", "MODEL_PATHS": "espeak=/nowhere", "DEFAULT_DEVICE": "cuda"}
        for name, value in wrong.items():
            monkeypatch.setenv(f"TTS_{name}", value)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert main([]) == EXIT_WRONG_SETTINGS
        stderr = capsys.readouterr().err
        named = sorted(line.split(":")[0].strip() for line in stderr.splitlines()[1:])
        assert named == sorted(f"TTS_{name}" for name in [*wrong, "WORKER_URL"])

    def test_no_gpu_for_triton(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """TTS_KERNELS=triton is refused at the start, with what is missing, in one sentence."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
        monkeypatch.setenv("TTS_KERNELS", "triton")
        monkeypatch.setenv("TTS_DEFAULT_DEVICE", "auto")
        monkeypatch.setenv("TTS_WORKER_URL", "ipc:///nowhere/worker.ipc")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert main([]) == EXIT_WRONG_SETTINGS
        (sentence,) = capsys.readouterr().err.splitlines()[1:]
        assert sentence.strip() == f"TTS_KERNELS: {NO_CUDA}; auto works without one"

    @pytest.mark.parametrize("command", ["download", "compare"])
    def test_commands_without_the_gpu_extra(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
    ) -> None:
        """The error says what to install."""
        monkeypatch.delitem(sys.modules, "gpu_worker.engines.qwen.checkpoint.download", raising=False)
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert main([command, "0.6B-Base"]) == EXIT_WRONG_SETTINGS
        assert GPU_EXTRA in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("option", "problem"),
        [
            *((f"--frames={number}", "must be a whole number from 1 to 1000") for number in ("0", "-2", "x", "1001")),
            ("--texts=blank", "blank has no text"),
            ("--texts=missing", "missing cannot be read: No such file or directory"),
            ("--texts=bytes", "bytes is not UTF-8"),
        ],
    )
    def test_wrong_arguments_of_compare(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        option: str,
        problem: str,
    ) -> None:
        """What nothing can be compared with is refused before a model is read."""
        monkeypatch.chdir(tmp_path)
        Path("blank").write_text(" \n")
        Path("bytes").write_bytes(b"\xff")
        with pytest.raises(SystemExit):
            main(["compare", "0.6B-Base", option])
        assert f"{option.partition('=')[0]}: {problem}" in capsys.readouterr().err

    def test_no_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`python -m gpu_worker cuda` works whatever the settings are."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("TTS_PORT", "http")
        assert main(["cuda"]) == 1

    def test_no_address(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The error shows an example of an address."""
        assert main([]) == EXIT_WRONG_SETTINGS
        assert "TTS_WORKER_URL: the worker needs an address" in capsys.readouterr().err
        assert main(["health"]) == EXIT_WRONG_SETTINGS

    def test_a_crash_is_no_wrong_setting(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A KeyError of a running worker is a crash, which the supervisor answers with a restart."""

        def crash(*_arguments: object) -> int:
            return {}["lost"]

        monkeypatch.setattr("gpu_worker.__main__._serve", crash)
        monkeypatch.setenv("TTS_WORKER_URL", f"ipc://{tmp_path}/worker.ipc")
        with pytest.raises(KeyError, match="lost"):
            main([])

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        """--help names the setting that is needed."""
        with pytest.raises(SystemExit) as caught:
            main(["--help"])
        assert caught.value.code == 0
        assert "TTS_WORKER_URL" in capsys.readouterr().out


class TestRefusesToStart:
    """Errors that only a real process can have."""

    def test_open_directory(self, process: _Process) -> None:
        """The socket's directory must be private."""
        (process.directory / "run").mkdir(mode=0o755)
        code, stderr = process.fails()
        assert code == EXIT_WRONG_SETTINGS
        assert "mode 0700" in stderr

    def test_unknown_models(self, process: _Process) -> None:
        """The catalogue lacks the default model."""
        code, stderr = process.fails(TTS_DEFAULT_MODEL="nonesuch")
        assert code == EXIT_WRONG_SETTINGS
        assert "TTS_DEFAULT_MODEL: there is no model 'nonesuch'" in stderr
        assert "Traceback" not in stderr

    def test_no_gpu(self, process: _Process) -> None:
        """A CUDA device is required, and there is none."""
        code, stderr = process.fails(TTS_DEFAULT_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
        assert code == EXIT_WRONG_SETTINGS
        assert "TTS_DEFAULT_DEVICE" in stderr

    def test_second_worker(self, process: _Process, running: subprocess.Popen[str]) -> None:
        """A second worker for one address ends, and the first goes on."""
        code, stderr = process.fails()
        assert code == EXIT_ALREADY_RUNNING
        assert "already serving" in stderr
        assert running.poll() is None
        assert check(process.url, "") is None


class TestStart:
    """The log of a start."""

    def test_missing_weights(self, process: _Process) -> None:
        """Without the weights of the default model the service is not ready; the log says so, and what to do."""
        model = "qwen3-tts-1.7b-customvoice"
        empty = {"TTS_MODELS_DIR": str(process.directory / "models"), "HF_HOME": str(process.directory / "hub")}
        worker = process.start(TTS_DEFAULT_MODEL=model, **empty)
        try:
            assert check(process.url, "", timeout_s=WAIT_S) is None
            worker.terminate()
            _, stderr = worker.communicate(timeout=WAIT_S)
        finally:
            worker.kill()
        (warning,) = [line for line in stderr.splitlines() if "default_model_unavailable" in line]
        assert model in warning
        assert "python -m gpu_worker download" in warning or GPU_EXTRA in warning


@pytest.mark.usefixtures("running")
def test_voices_are_on_the_disk(process: _Process) -> None:
    """A voice is on the disk when its call is answered, and gone when its delete is."""
    voices = process.directory / "voices"
    saved = _call(process.url, CloneVoice(name="Ada"), b"\1\7\2\7" * 24_000).voice
    assert saved is not None
    assert {path.name for path in voices.glob("voice_*")} == {f"{saved.id}.json", f"{saved.id}.safetensors"}
    assert _call(process.url, DeleteVoice(id=saved.id)).voice == saved
    assert list(voices.glob("voice_*")) == []


class TestEnd:
    """The end of the process."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal(self, process: _Process, running: subprocess.Popen[str], number: signal.Signals) -> None:
        """On a signal the worker drains, logs that, and frees the address."""
        running.send_signal(number)
        _, stderr = running.communicate(timeout=WAIT_S)
        assert running.returncode == 0
        assert "drained" in stderr
        assert "Traceback" not in stderr
        claim(process.url).close()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "step", ["gpu_worker.engines.factory.EngineFactory.open", "gpu_worker.__main__.build_worker"]
    )
    def test_during_a_start(self, process: _Process, step: str) -> None:
        """The process waits neither for a load nor for its imports, which take ten seconds each on a CPU."""
        program = (
            "import sys, time, unittest.mock\n"
            "from gpu_worker.__main__ import main\n"
            "def wait(*_, **__): print('waiting', file=sys.stderr); time.sleep(60)\n"
            f"with unittest.mock.patch({step!r}, wait): sys.exit(main([]))\n"
        )
        worker = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=process.directory,
            env=process.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert worker.stderr is not None
            next(line for line in worker.stderr if "waiting" in line)
            worker.send_signal(signal.SIGINT)
            assert worker.wait(timeout=5) == 0
        finally:
            worker.kill()
            worker.communicate()

    def test_further_signals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only Ctrl-C hurries a worker that drains: systemd and a supervisor each send a SIGTERM."""
        handlers: dict[int, Any] = {}
        monkeypatch.setattr(signal, "signal", handlers.__setitem__)
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        gpu_worker.__main__._drain_on_signals(inbox, 30, supervised=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            handlers[number](number, None)
        assert [inbox.get_nowait() for _ in range(3)] == [Drain(30), Drain(30), Drain(0)]

    @pytest.mark.slow
    def test_parent_dies(self, process: _Process) -> None:
        """A worker ends with its parent: no other process would stop it."""
        program = (
            "import subprocess, sys\n"
            "from gpu_worker.health import check\n"
            "subprocess.Popen([sys.executable, '-m', 'gpu_worker'])\n"
            f"sys.exit(check({process.url!r}, '', timeout_s={WAIT_S}))\n"
        )
        parent = subprocess.run(
            [sys.executable, "-c", program],
            cwd=process.directory,
            env=process.environment,
            stderr=subprocess.DEVNULL,
            timeout=2 * WAIT_S,
            check=False,
        )
        assert parent.returncode == 0
        _wait_until_free(process.url)


class TestHealth:
    """`python -m gpu_worker health`."""

    def test_alive(self, process: _Process, running: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """0 if the loop answers, 1 if it hangs or refuses the token."""
        monkeypatch.chdir(process.directory)
        monkeypatch.setenv("TTS_WORKER_URL", process.url)
        assert main(["health"]) == 0
        monkeypatch.setenv("TTS_WORKER_TOKEN", "another")
        assert main(["health"]) == 1
        monkeypatch.delenv("TTS_WORKER_TOKEN")
        running.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(gpu_worker.__main__, "check", functools.partial(check, timeout_s=0.5))
        assert main(["health"]) == 1


def _call(url: str, action: Action, payload: bytes | None = None) -> Reply:
    """The reply of the worker at `url` to a call."""
    with zmq.Context() as context, connect_dealer(context, url) as dealer:
        dealer.send_multipart(encode(Hello(version=VERSION, token="")))
        dealer.send_multipart(encode(Call(id="c", client="alice", action=action), payload))
        while dealer.poll(WAIT_S * 1000):
            message, _ = decode_from_worker(dealer.recv_multipart())
            if isinstance(message, Reply):
                return message
    raise AssertionError("there was no reply")


def _wait_until_free(url: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            claim(url).close()
        except AlreadyRunningError:
            assert time.monotonic() < deadline, "the worker is still there"
            time.sleep(0.05)  # between two looks at another process
        else:
            return
