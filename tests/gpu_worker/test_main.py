"""The worker as a process: its address, its exit codes, its end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from gpu_worker.__main__ import EXIT_ALREADY_RUNNING, EXIT_WRONG_SETTINGS, main
from gpu_worker.engines.factory import GPU_EXTRA
from gpu_worker.health import check
from shared.protocol import VERSION, Action, Call, CloneVoice, DeleteVoice, Hello, Reply, decode_from_worker, encode
from shared.sockets import AlreadyRunningError, claim, connect_dealer

WAIT_S = 30


class _Process:
    """Starts `python -m gpu_worker` in an empty directory, with an address in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"ipc://{directory}/run/worker.ipc"
        plain = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
        self.environment = plain | {
            "TTS_WORKER_URL": self.url,
            "TTS_DEFAULT_DEVICE": "cpu",
            "TTS_VOICES_DIR": str(directory / "voices"),
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
        """Its exit code and its last words."""
        process = self.start(**variables)
        _, words = process.communicate(timeout=WAIT_S)
        return process.returncode, words


@pytest.fixture
def process(tmp_path: Path) -> _Process:
    """A worker that could be started."""
    return _Process(tmp_path)


@pytest.fixture
def running(process: _Process) -> Iterator[subprocess.Popen[str]]:
    """A worker that answers."""
    worker = process.start()
    try:
        assert check(process.url, "", timeout_s=WAIT_S) is None
        yield worker
    finally:
        worker.kill()
        worker.communicate()


class TestSettings:
    """What stops the start."""

    @pytest.fixture(autouse=True)
    def _clean(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in os.environ:
            if name.startswith("TTS_"):
                monkeypatch.delenv(name)
        monkeypatch.chdir(tmp_path)

    def test_every_mistake(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """All mistakes are named at once, those of .env too; the environment counts before it."""
        (tmp_path / ".env").write_text("TTS_PORT=http\nTTS_LOG_LEVEL=loud\nTTS_MAX_QUEUE\n")
        monkeypatch.setenv("TTS_IDLE_TIMEOUT", "never")
        monkeypatch.setenv("TTS_LOG_LEVEL", "info")
        assert main([]) == EXIT_WRONG_SETTINGS
        words = capsys.readouterr().err
        assert "TTS_PORT" in words
        assert "TTS_IDLE_TIMEOUT" in words
        assert "TTS_LOG_LEVEL" not in words

    def test_mistakes_of_every_kind(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        """What only the catalogue, the disk and the driver know stands in the same message as the rest."""
        wrong = {"PORT": "http", "DEFAULT_MODEL": "void", "MODEL_PATHS": "espeak=/nowhere", "DEFAULT_DEVICE": "cuda"}
        for name, value in wrong.items():
            monkeypatch.setenv(f"TTS_{name}", value)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert main([]) == EXIT_WRONG_SETTINGS
        words = capsys.readouterr().err
        named = sorted(line.split(":")[0].strip() for line in words.splitlines()[1:])
        assert named == sorted(f"TTS_{name}" for name in [*wrong, "WORKER_URL"])

    def test_downloading_without_the_gpu_extra(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It says what to install."""
        monkeypatch.delitem(sys.modules, "gpu_worker.engines.qwen.checkpoint.download", raising=False)
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert main(["download", "0.6B-Base"]) == EXIT_WRONG_SETTINGS
        assert GPU_EXTRA in capsys.readouterr().err

    def test_no_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`python -m gpu_worker cuda` tells the server, whatever the settings are."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("TTS_PORT", "http")
        assert main(["cuda"]) == 1

    def test_no_address(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Without an address it says what one looks like."""
        assert main([]) == EXIT_WRONG_SETTINGS
        assert "TTS_WORKER_URL: the worker needs an address" in capsys.readouterr().err
        assert main(["health"]) == EXIT_WRONG_SETTINGS

    def test_our_own_mistakes_are_none_of_theirs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A KeyError of a running worker is a crash, after which it is started again, and no wrong setting."""

        def crash(*_arguments: object) -> int:
            return {}["lost"]

        monkeypatch.setattr("gpu_worker.__main__._serve", crash)
        monkeypatch.setenv("TTS_WORKER_URL", f"ipc://{tmp_path}/worker.ipc")
        with pytest.raises(KeyError, match="lost"):
            main([])

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        """--help says what this is and what it needs."""
        with pytest.raises(SystemExit) as caught:
            main(["--help"])
        assert caught.value.code == 0
        assert "TTS_WORKER_URL" in capsys.readouterr().out


class TestRefusesToStart:
    """Found out only once it is a process."""

    def test_open_directory(self, process: _Process) -> None:
        """A socket in a directory that others can enter."""
        (process.directory / "run").mkdir(mode=0o755)
        code, words = process.fails()
        assert code == EXIT_WRONG_SETTINGS
        assert "mode 0700" in words

    def test_unknown_models(self, process: _Process) -> None:
        """Models that the catalogue lacks."""
        code, words = process.fails(TTS_DEFAULT_MODEL="nonesuch")
        assert code == EXIT_WRONG_SETTINGS
        assert "TTS_DEFAULT_MODEL: there is no model 'nonesuch'" in words
        assert "Traceback" not in words

    def test_no_gpu(self, process: _Process) -> None:
        """A CUDA device asked for, and none at hand."""
        code, words = process.fails(TTS_DEFAULT_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
        assert code == EXIT_WRONG_SETTINGS
        assert "TTS_DEFAULT_DEVICE" in words

    def test_second_worker(self, process: _Process, running: subprocess.Popen[str]) -> None:
        """A second one for the same address goes, and the first stays."""
        code, words = process.fails()
        assert code == EXIT_ALREADY_RUNNING
        assert "already serving" in words
        assert running.poll() is None
        assert check(process.url, "") is None


class TestStarts:
    """What it says of what it can do."""

    def test_weights_that_are_missing(self, process: _Process) -> None:
        """A default model without weights leaves the service not ready: that is told at the start, with what to do."""
        model = "qwen3-tts-1.7b-customvoice"
        empty = {"TTS_MODELS_DIR": str(process.directory / "models"), "HF_HOME": str(process.directory / "hub")}
        worker = process.start(TTS_DEFAULT_MODEL=model, **empty)
        try:
            assert check(process.url, "", timeout_s=WAIT_S) is None
            worker.terminate()
            _, words = worker.communicate(timeout=WAIT_S)
        finally:
            worker.kill()
        (warning,) = [line for line in words.splitlines() if "default_model_unavailable" in line]
        assert model in warning
        assert "python -m gpu_worker download" in warning or GPU_EXTRA in warning


@pytest.mark.usefixtures("running")
def test_voices_are_kept(process: _Process) -> None:
    """A voice is on the disk when the answer comes, and off it again when the next does."""
    voices = process.directory / "voices"
    kept = _asked(process.url, CloneVoice(name="Ada"), b"\1\7\2\7" * 24_000).voice
    assert kept is not None
    assert {path.name for path in voices.iterdir()} == {f"{kept.id}.json", f"{kept.id}.safetensors"}
    assert _asked(process.url, DeleteVoice(id=kept.id)).voice == kept
    assert list(voices.iterdir()) == []


class TestEnd:
    """How it ends."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal(self, process: _Process, running: subprocess.Popen[str], number: signal.Signals) -> None:
        """Told to end it drains, says so, and leaves the address to the next."""
        running.send_signal(number)
        _, words = running.communicate(timeout=WAIT_S)
        assert running.returncode == 0
        assert "drained" in words
        assert "Traceback" not in words
        claim(process.url).close()

    def test_parent_dies(self, process: _Process) -> None:
        """A worker whose parent is gone goes too: nobody else would ever stop it."""
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
        """0 where the loop answers, 1 where it is stopped or will not have us."""
        monkeypatch.chdir(process.directory)
        monkeypatch.setenv("TTS_WORKER_URL", process.url)
        assert main(["health"]) == 0
        monkeypatch.setenv("TTS_WORKER_TOKEN", "another")
        assert main(["health"]) == 1
        monkeypatch.delenv("TTS_WORKER_TOKEN")
        running.send_signal(signal.SIGSTOP)
        assert main(["health"]) == 1


def _asked(url: str, action: Action, payload: bytes | None = None) -> Reply:
    """What the worker at `url` replies to a call."""
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
