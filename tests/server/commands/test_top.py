"""`top`: the answers of the admin endpoints on one screen."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import main
from tests.server.commands.conftest import CannedService

VRAM: dict[str, Any] = {
    "device": {"name": "NVIDIA H100", "kind": "cuda", "total_bytes": 80 * 2**30, "used_bytes": 20 * 2**30}
    | {"free_bytes": 60 * 2**30, "ours_bytes": 5 * 2**30, "others_bytes": 15 * 2**30, "budget_bytes": 70 * 2**30},
    "shared": {"codec": 300 * 2**20},
    "host": {"offloaded_bytes": 2 * 2**30},
    "models": [
        {"id": "qwen3-large", "state": "resident", "bytes": {"weights": 4 * 2**30, "kv": 2**30}, "idle_s": 75.2}
        | {"references": 3, "pinned": True},
        {"id": "qwen3-small", "state": "offloaded", "bytes": {}, "idle_s": 4000.0, "references": 0, "pinned": False},
    ],
}
STATS: dict[str, Any] = {
    "worker": {"pid": 4711, "boot_id": "b", "uptime_s": 3661.0, "restarts": 2},
    "running": 3,
    "queued": 9,
    "slots": 32,
    "buffered": 4,
    "stalled": 1,
    "audio_buffer": {"used_bytes": 30 * 2**20, "budget_bytes": 512 * 2**20},
    "requests": {"started": 100, "finished": 90, "failed": 1, "cancelled": 4, "rejected": 5},
    "streams": [
        {
            "id": "abc.1",
            "model": "qwen3-large",
            "client": "key:12",
            "state": "generating",
            "age_s": 2.25,
            "audio_s": 9.5,
        }
        | {"buffered_s": 7.5},
        {"id": "abc.2", "model": "qwen3-small", "client": "peer:::1", "state": "waiting", "age_s": 61, "audio_s": 0},
    ],
}


@pytest.fixture
def watched(service: CannedService) -> CannedService:
    """A service with models and streams."""
    service.answers |= {"/admin/vram": (200, VRAM), "/admin/stats": (200, STATS)}
    return service


def test_once(watched: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """The output has every value that matters."""
    assert main(["top", "--once"]) == 0
    assert len(watched.asked) == 2
    out = capfd.readouterr().out
    for shown in ("pid 4711", "up 1:01:01", "restarts 2", "running 3 / 32", "queued 9", "rejected 5", "NVIDIA H100"):
        assert shown in out
    for shown in ("20,480 MB of 81,920 MB", "ours 5,120 MB", "others 15,360 MB", "shared 300 MB", "RAM 2,048 MB"):
        assert shown in out
    for shown in ("buffered 4", "stalled 1", "audio buffer 30 MB of 512 MB"):
        assert shown in out
    assert "and 14 more" in out
    generating = next(line for line in out.splitlines() if "abc.1" in line)
    assert generating.split() == ["abc.1", "qwen3-large", "key:12", "generating", "2.2", "s", "9.5", "s", "7.5", "s"]
    assert next(line for line in out.splitlines() if "abc.2" in line).split()[3:5] == ["waiting", "61.0"]
    large = next(line for line in out.splitlines() if "qwen3-large" in line)
    for shown in ("resident", "5,120 MB", "weights 4,096 MB", "1:15", "3", "yes"):
        assert shown in large


def test_a_cluster(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """Each GPU worker has a row with its place, its device's memory, its requests, and what is wrong with it."""
    replicas: list[dict[str, Any]] = [
        {"replica": "a", "node": "10.0.0.1", "gpus": ["3"], "error": None, "running": 2, "queued": 5, "slots": 16},
        {"replica": "b", "node": "10.0.0.2", "gpus": [], "error": "it is gone", "running": 0, "queued": 0, "slots": 16},
    ]
    stats = STATS | {"replicas": [replica | {"worker": STATS["worker"]} for replica in replicas]}
    devices = [VRAM["device"] | {"name": f"GPU of {replica['replica']}"} for replica in replicas]
    memory = [replica | {"device": device} for replica, device in zip(replicas, devices, strict=True)]
    service.answers |= {"/admin/vram": (200, VRAM | {"replicas": memory}), "/admin/stats": (200, stats)}
    assert main(["top", "--once"]) == 0
    out = capfd.readouterr().out
    assert "1 of 2" in out
    first = next(line for line in out.splitlines() if "10.0.0.1" in line)
    for shown in ("3", "20,480 MB of 81,920 MB", "2 / 16", "5", "1:01:01"):
        assert shown in first
    second = next(line for line in out.splitlines() if "10.0.0.2" in line)
    assert "GPU of b" in second
    assert second.rstrip().endswith("it is gone")


def test_missing_values_are_no_error(service: CannedService) -> None:
    """A service that is not connected to its worker is shown without the missing values."""
    stats = {"worker": None, "streams": None}
    service.answers |= {"/admin/vram": (200, {"device": None}), "/admin/stats": (200, stats)}
    assert main(["top", "--once"]) == 0


def test_a_refusal_is_its_message(service: CannedService, capfd: pytest.CaptureFixture[str]) -> None:
    """A refusal ends the command with the message of the service."""
    service.answers["/admin/vram"] = (403, {"error": {"message": "an admin key is needed"}})
    assert main(["top", "--once"]) == 1
    assert capfd.readouterr().err == "an admin key is needed (HTTP 403); name a key with --key @FILE\n"


@pytest.mark.parametrize("interval", ["0", "x", "1e9", "nan"])
def test_intervals_out_of_range_are_refused(interval: str, capfd: pytest.CaptureFixture[str]) -> None:
    """An interval of zero, of days or of no number is refused."""
    with pytest.raises(SystemExit):
        main(["top", "--interval", interval])
    assert f"--interval: must be seconds, from 0.1 to 3600, not {interval!r}" in capfd.readouterr().err


def test_live_on_a_terminal_until_ctrl_c(watched: CannedService) -> None:
    """On a terminal `top` draws again and again; Ctrl-C ends it with exit code 0."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "TERM": "xterm", "COLUMNS": "150"}
    command = [sys.executable, "-m", "server", "top", "--interval", "0.1"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environ) as process:
        os.close(theirs)
        seen = b""
        while seen.count(b"4711") < 3:
            seen += os.read(ours, 65_536)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 0
    os.close(ours)
    assert len(watched.asked) >= 6
