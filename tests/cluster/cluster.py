"""A cluster for tests: `python -m server cluster` with a Ray of its own, two espeak-ng workers and all processes."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.system.service import Service, children_of, eventually

START_TIMEOUT_S: Final = 110.0
STOP_TIMEOUT_S: Final = 60.0


class Cluster(Service):
    """One running cluster."""

    command = ("cluster",)

    def processes(self) -> set[int]:
        """All processes of the cluster but the main one."""
        found, new = set(), {self.process.pid}
        while new:
            new = {child for pid in new for child in children_of(pid)} - found
            found |= new
        return found

    def named(self, *parts: str) -> set[int]:
        """The processes whose command line has all of `parts`."""
        return {pid for pid in self.processes() if all(part in _command_of(pid) for part in parts)}

    def workers(self) -> set[int]:
        """The GPU workers."""
        return self.named("-m gpu_worker")

    def replicas(self, deployment: str) -> set[int]:
        """The actors of a deployment: "engine" or "ingress"."""
        return self.named(f"ServeReplica:speech:{deployment}")

    def kill(self) -> None:
        """Kill every process of the cluster that still runs."""
        self.http.close()
        for pid in [self.process.pid, *self.processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


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
            eventually(lambda: cluster.stats()["slots"], 30, "replicas")
            yield cluster
            processes = cluster.processes()
            assert cluster.stop(STOP_TIMEOUT_S) == 0
            eventually(lambda: not [pid for pid in processes if _command_of(pid)], 20, "no process left")
        finally:
            cluster.kill()


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
