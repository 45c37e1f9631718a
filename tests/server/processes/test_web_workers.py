"""WebServer: it restarts web workers that died, and ends the service where none can ever start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = str(Path(__file__).parents[3])

PROGRAM = """
import os, sys
from pathlib import Path
import server.commands.serve as serve
import server.processes.restarts as restarts
from server.__main__ import main

restarts.FIRST_PAUSE_S = 0.01
{application}
sys.exit(main())
"""

CANNOT_START = """
def broken(*_):
    raise ImportError("a web worker lacks something")
serve.web_application = broken
"""

STARTS_AT_THE_FIFTH_ATTEMPT = """
def late(*state, real=serve.web_application):
    attempts = Path("attempts")
    attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
    if len(attempts.read_text()) < 5:
        os.kill(os.getpid(), 9)
    application = real(*state)
    application.app.on_startup.append(lambda: os.kill(os.getppid(), 15))
    return application
serve.web_application = late
"""


def serve(directory: Path, application: str) -> tuple[int, str]:
    """The exit code and the log of a service whose web workers run `application` before they load theirs."""
    settings = {"TTS_PORT": str(free_port()), "TTS_WORKER_URL": f"ipc://{directory}/run/worker.ipc"}
    environ = {**os.environ, **settings, "PYTHONPATH": ROOT}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(application=application)],
        cwd=directory,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("web_workers", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_web_workers_that_can_never_start_end_the_service(
    tmp_path: Path, web_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three attempts, each with its reason in the log, one line says so and the exit code is 1."""
    monkeypatch.setenv("TTS_WEB_WORKERS", str(web_workers))
    code, said = serve(tmp_path, CANNOT_START)
    assert code == 1
    assert 3 <= said.count("ImportError: a web worker lacks something") <= 3 * web_workers
    assert said.count("web_workers_cannot_start") == 1


@pytest.mark.slow
def test_killed_starts_do_not_count(tmp_path: Path) -> None:
    """Web workers that are killed from outside before they serve, where memory is short, are always restarted."""
    code, said = serve(tmp_path, STARTS_AT_THE_FIFTH_ATTEMPT)
    assert code == 0
    assert said.count("web_worker_died") == 4
    assert "cause=SIGKILL" in said
