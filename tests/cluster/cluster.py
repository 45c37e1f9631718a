"""A cluster for tests: `python -m server cluster` with a Ray of its own, two espeak-ng workers and all processes."""

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx

from tests.recogniser import SENTENCES
from tests.system.service import Service, children_of, eventually

START_TIMEOUT_S: Final = 300.0
STOP_TIMEOUT_S: Final = 120.0

LONG: Final = " ".join(SENTENCES * 100)[:99_000]
"""Two hours of speech: it is still being spoken when its test ends."""


READING_PAUSE_S: Final = 0.1
"""The rest of a listener after each piece of speech."""


class Cluster(Service):
    """One running cluster."""

    command = ("cluster",)

    def processes(self) -> set[int]:
        """All processes of the cluster but the main one."""
        return descendants_of(self.process.pid)

    def named(self, *parts: str) -> set[int]:
        """The processes whose command line has all of `parts`."""
        return {pid for pid in self.processes() if all(part in _command_of(pid) for part in parts)}

    def workers(self) -> set[int]:
        """The GPU workers."""
        return self.named("-m gpu_worker")

    def replicas(self, deployment: str) -> set[int]:
        """The actors of a deployment: "engine" or "ingress"."""
        return self.named(f"ServeReplica:speech:{deployment}")

    def listening(self) -> set[str]:
        """The addresses at which its processes listen, as the kernel writes them."""
        sockets = set()
        for pid in [self.process.pid, *self.processes()]:
            with contextlib.suppress(OSError):
                sockets |= {str(descriptor.readlink()) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
        tables = (Path(f"/proc/net/{table}").read_text(encoding="ascii") for table in ("tcp", "tcp6"))
        rows = [line.split() for table in tables for line in table.splitlines()]
        return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}

    def kill(self) -> None:
        """Kill every process of the cluster that still runs."""
        self.http.close()
        for pid in [self.process.pid, *self.processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Listener:
    """A client that reads the speech of a text until it is complete or breaks, or until it leaves.

    It reads slower than espeak-ng speaks, and so leaves CPU time to the reports of the replicas.
    """

    def __init__(self, cluster: Cluster, text: str = LONG) -> None:
        self._text = text
        self.received = 0
        self.ended = ""
        self.pause_s = READING_PAUSE_S
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(cluster.url,), daemon=True)
        self._thread.start()

    def _listen(self, url: str) -> None:
        body = {"input": self._text, "response_format": "pcm"}
        try:
            with httpx.stream("POST", f"{url}/v1/audio/speech", json=body, timeout=60, trust_env=False) as answer:
                if answer.status_code != httpx.codes.OK:
                    self.ended = f"refused {answer.status_code}"
                    return
                for piece in answer.iter_raw():
                    self.received += len(piece)
                    if self._leave.wait(self.pause_s):
                        self.ended = "left"
                        return
                self.ended = "complete"
        except httpx.TransportError:
            self.ended = "broken"

    def wait(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._thread.join(timeout_s)

    def leave(self) -> None:
        """Close the connection."""
        self._leave.set()
        self._thread.join(30)

    def goes_on(self) -> None:
        """Wait for more of the speech."""
        before = self.received
        eventually(lambda: self.received > before, 60, f"more after {before} bytes; {self.ended}")


@contextlib.contextmanager
def running_cluster(directory: Path, **settings: object) -> Iterator[Cluster]:
    """A ready cluster. At the end it stops at SIGTERM with exit code 0 and leaves no process."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder:
        # Ray's sockets stand below this folder, and their paths may have 107 bytes.
        os.environ["RAY_TMPDIR"] = ray_folder
        try:
            cluster = Cluster(directory, **settings)
        finally:
            del os.environ["RAY_TMPDIR"]
        try:
            cluster.wait_ready(START_TIMEOUT_S)
            eventually(lambda: cluster.stats()["slots"], 60, "replicas")
            yield cluster
            processes = cluster.processes()
            assert cluster.stop(STOP_TIMEOUT_S) == 0
            eventually(lambda: not [pid for pid in processes if _command_of(pid)], 60, "no process left")
        finally:
            cluster.kill()


def descendants_of(pid: int) -> set[int]:
    """The processes that `pid` has started, and those that they have started."""
    found, new = set(), {pid}
    while new:
        new = {child for one in new for child in children_of(one)} - found
        found |= new
    return found


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
