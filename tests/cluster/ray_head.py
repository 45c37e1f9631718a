"""A Ray cluster that runs on this machine, as an operator starts it, and the service that is deployed on it."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.cluster.cluster import START_TIMEOUT_S, Cluster, descendants_of
from tests.ports import free_port
from tests.system.service import environment, eventually, is_running

TOKEN: Final = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
"""The variables of each process that is to reach a Ray that asks for a token."""

_BIN: Final = Path(sys.executable).parent


class RayHead:
    """`ray start --head` with `cpus`: a process whose descendants are all of Ray and Serve."""

    def __init__(self, directory: Path, temp_dir: str, cpus: int) -> None:
        port, dashboard_port = free_port(), free_port()
        self.address = f"127.0.0.1:{port}"
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        options = {
            "port": port,
            "dashboard-port": dashboard_port,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "node-ip-address": "127.0.0.1",
            "num-cpus": cpus,
            "temp-dir": temp_dir,
        }
        self.log = directory / "ray.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [_BIN / "ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())],
                cwd=directory,
                env=environment() | TOKEN | {"RAY_USAGE_STATS_ENABLED": "0", "FORWARDED_ALLOW_IPS": ""},
                stdout=log,
                stderr=log,
            )

    def wait_ready(self) -> None:
        """Wait until applications can be deployed."""
        eventually(lambda: "Ray runtime started" in self.log.read_text(), 120, self.log.read_text)

    def serve(self, *arguments: str) -> None:
        """Run Ray's command `serve`."""
        command = [_BIN / "serve", *arguments, "--address", self.dashboard]
        subprocess.run(command, env=environment() | TOKEN, check=True, capture_output=True, timeout=120)


class JoinedCluster(Cluster):
    """The service on a Ray cluster that runs, deployed by `python -m server cluster --address`."""

    def __init__(self, directory: Path, head: RayHead, **settings: object) -> None:
        self.command = ("cluster", "--address", head.address)
        self.inherited = TOKEN
        self._head = head
        self._directory = directory
        super().__init__(directory, **settings)
        self._deployers = [self.process]

    def processes(self) -> set[int]:
        """All processes of Ray and Serve."""
        return descendants_of(self._head.process.pid)

    def redeploy(self, **settings: object) -> "subprocess.Popen[bytes]":
        """Deploy the service anew with changed settings. Returns the process that deployed it before."""
        before = self.process
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", *self.command],
                cwd=self._directory,
                env=self._changed(settings),
                stdout=log,
                stderr=log,
            )
        self._deployers.append(self.process)
        return before

    def deploy_file(self, **settings: object) -> None:
        """Deploy the service anew with changed settings, by a file and Ray's command."""
        printed = subprocess.run(
            [sys.executable, "-m", "server", "cluster", "--print-config"],
            cwd=self._directory,
            env=self._changed(settings),
            check=True,
            capture_output=True,
        )
        self._deploy(printed.stdout)

    def remove(self) -> int:
        """Take the service away by its command; the exit code."""
        command = [sys.executable, "-m", "server", *self.command, "--stop"]
        return subprocess.run(command, cwd=self._directory, env=self.variables, check=False, timeout=300).returncode

    def end(self) -> None:
        """Kill the processes that have deployed the service."""
        self.http.close()
        for process in self._deployers:
            process.kill()
            process.wait()

    def _deploy(self, config: bytes) -> None:
        file = self._directory / "serve.yaml"
        file.write_bytes(config)
        self._head.serve("deploy", str(file))

    def _changed(self, settings: dict[str, object]) -> dict[str, str]:
        self.variables = self.variables | {f"TTS_{name}": str(value) for name, value in settings.items()}
        return self.variables


@contextlib.contextmanager
def joined_cluster(directory: Path, *, cpus: int, **settings: object) -> Iterator[JoinedCluster]:
    """A ready cluster on a Ray with so many CPUs. At the end all processes are killed."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp_dir:
        head = RayHead(directory, temp_dir, cpus)
        try:
            head.wait_ready()
            cluster = JoinedCluster(directory, head, **settings)
            try:
                cluster.wait_ready(START_TIMEOUT_S)
                yield cluster
            finally:
                cluster.end()
        finally:
            _end_tree(head.process)


def _end_tree(process: "subprocess.Popen[bytes]") -> None:
    """End a process by SIGTERM, and kill what is left of its descendants."""
    descendants = descendants_of(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    for pid in [process.pid, *descendants]:
        if is_running(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()
