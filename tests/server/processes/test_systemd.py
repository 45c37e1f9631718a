"""The messages to systemd, and the unit of the repository."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from server.processes.systemd import Systemd
from shared.settings import Settings

UNIT = Path(__file__).parents[3] / ".github" / "systemd" / "tts.service"


def told(address: str, **environ: str) -> list[str]:
    """The messages of a whole life of the service to the socket of systemd."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        systemd.setblocking(False)
        service = Systemd({"NOTIFY_SOCKET": address, **environ})
        for _ in range(3):
            service.ready()
        service.stopping()
        messages = []
        while True:
            try:
                messages.append(systemd.recv(100).decode())
            except BlockingIOError:
                return messages


def test_a_life(tmp_path: Path) -> None:
    """Ready once, and stopping; with a watchdog it is well at every look."""
    assert told(str(tmp_path / "notify")) == ["READY=1", "STOPPING=1"]
    watched = told(f"@tts-test-{tmp_path.name}", WATCHDOG_USEC="60000000")
    assert watched == ["READY=1", "WATCHDOG=1", "WATCHDOG=1", "STOPPING=1"]


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/nowhere/notify"}, {"NOTIFY_SOCKET": "x" * 500}])
def test_nobody_listens(environ: dict[str, str]) -> None:
    """Without systemd, or with a socket that is gone, the service runs all the same."""
    service = Systemd(environ)
    service.ready()
    service.stopping()


class TestUnit:
    """.github/systemd/tts.service."""

    def test_the_stop_lets_streams_end(self) -> None:
        """Systemd kills only after the drain, and the 10 s that a load in flight is waited for."""
        lines = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#")
        assert int(lines["TimeoutStopSec"]) > Settings().drain_timeout_s + 10
        assert lines["Type"] == "notify"

    @pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
    def test_systemd_takes_it(self, tmp_path: Path) -> None:
        """Systemd has nothing to say against it, once its paths are there."""
        unit = tmp_path / "tts.service"
        text = UNIT.read_text().replace("/opt/tts/.venv/bin/python", "/bin/true").replace("/opt/tts", str(tmp_path))
        unit.write_text(text)
        command = ["systemd-analyze", "verify", "--man=no", str(unit)]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Failed to" in checked.stderr and "bus" in checked.stderr:
            pytest.skip("systemd does not run here")
        assert (checked.returncode, checked.stderr) == (0, "")
