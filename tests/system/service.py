"""The real service for tests: `python -m server` on a free port of the loopback, with every process that it starts."""

import contextlib
import ctypes
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from tests.ports import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
START_TIMEOUT_S: Final = 90.0
START_PAUSE_S: Final = 0.05
"""Between two looks at a service that starts: each look takes CPU from the start, which takes seconds."""

NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For `verify` of a client that speaks plain http: by default httpx reads all authorities, which takes 27 ms."""

STEPS: Final = 2_000_000
STEPS_S: Final = 0.07
"""The time of that many empty steps on an idle machine; `stretched` compares it with the time of now."""

BURST: Final = 4
"""`in_time` gives so much more time on a busy machine: a burst of load may be over before it is measured."""

PATIENCE_S: Final = 60.0
"""The wait for an event that must come, in a test that claims nothing about time."""


def eventually(
    condition: Callable[[], object], timeout_s: float, what: str | Callable[[], str], *, pause_s: float = 0.02
) -> float:
    """Check `condition` every `pause_s` until it is true; the seconds that took. AssertionError after `timeout_s`.

    `what` describes the condition in the error; a function is called only when the error is raised.
    """
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        assert waited < timeout_s, f"not within {timeout_s} s: {what if isinstance(what, str) else what()}"
        time.sleep(pause_s)  # polls another process; no test relies on the length of this pause
    return time.monotonic() - began


def stretched(limit_s: float) -> float:
    """`limit_s`, or more if the machine is slow or busy: by how much longer a short computation takes here and now."""
    began = time.monotonic()
    for _ in range(STEPS):
        pass
    return limit_s * max(1.0, (time.monotonic() - began) / STEPS_S)


def in_time(took_s: float, limit_s: float) -> bool:
    """True if `took_s` is less than `limit_s`, or as long as a slow or busy machine may take for that."""
    is_busy = os.getloadavg()[0] > (os.cpu_count() or 1)  # within the last minute
    return took_s < limit_s or took_s < (BURST if is_busy else 1) * stretched(limit_s)


def soon(condition: Callable[[], object], limit_s: float, what: str | Callable[[], str]) -> None:
    """Wait until `condition` is true. AssertionError if that was not `in_time`."""
    looks_s: list[float] = []

    def look() -> object:
        began = time.monotonic()
        result = condition()
        looks_s.append(time.monotonic() - began)
        return result

    took_s = eventually(look, PATIENCE_S, what)
    assert in_time(took_s, limit_s), (
        f"{took_s:.2f} s, and not {limit_s} s: {what if isinstance(what, str) else what()}; "
        f"the slowest of {len(looks_s)} looks took {max(looks_s):.2f} s"
    )


def children_of(pid: int) -> set[int]:
    """The processes that `pid` started and that still run."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.add(int(stat.parent.name))
    return found


def resident_bytes(pid: int) -> int:
    """The process's memory in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_running(pid: int) -> bool:
    """True if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def environment(**settings: object) -> dict[str, str]:
    """This process's environment without its TTS_* variables, and with `settings`, named without that prefix."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
    ours = {f"TTS_{name}": str(value) for name, value in settings.items()}
    return inherited | ours | {"PYTHONPATH": str(ROOT)}


def drop_privileges() -> None:
    """For `preexec_fn`: root in the new process may not read what its modes forbid, nor take a port below 1024."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2, 10):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; other users lack them, and may not call this


class Service:
    """One running service; `settings` are TTS_* variables without the prefix. `root` has its code."""

    command: tuple[str, ...] = ()
    """The command of `python -m server`, and its arguments."""

    inherited: Mapping[str, str] = {}
    """Variables that are no settings of the service."""

    def __init__(
        self,
        directory: Path,
        *,
        preexec_fn: Callable[[], None] | None = None,
        root: Path = ROOT,
        **settings: object,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"service-{self.port}.log"
        defaults: Mapping[str, object] = {
            "PORT": self.port,
            "VOICES_DIR": directory / "voices",
            "USAGE_FILE": directory / "usage.sqlite",
            "MAX_INPUT_CHARS": 100_000,
        }
        self.variables = environment(**{**defaults, **settings}) | self.inherited | {"PYTHONPATH": str(root)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", *self.command],
                cwd=directory,
                env=self.variables,
                stdout=log,
                stderr=log,
                preexec_fn=preexec_fn,  # noqa: PLW1509 -- no other thread of the tests holds a lock
            )
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=NO_TLS)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> "Service":
        """Wait until /ready answers 200. AssertionError with the log if the service ends before."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.is_ready()

        eventually(ready, timeout_s, lambda: f"ready; the log says:\n{self.log.read_text()}", pause_s=START_PAUSE_S)
        return self

    def is_ready(self) -> bool:
        """True if /ready answers 200 now."""
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/ready", timeout=2).status_code == httpx.codes.OK
        return False

    def stats(self) -> Any:
        """The body of /admin/stats."""
        answer = self.http.get("/admin/stats")
        answer.raise_for_status()
        return answer.json()

    def fresh_stats(self) -> Any:
        """`stats` with figures that were read after this call began; others may be 250 ms old."""
        self.http.get("/v1/models").raise_for_status()  # its figures are always new, and kept for the next request
        return self.stats()

    def running(self) -> int:
        """Requests that hold a slot, as /admin/stats counts them."""
        count: int = self.stats()["running"]
        return count

    def open_requests(self) -> int:
        """Requests that have not ended, of the first 32: in the queue, in a slot, or waiting for their reader."""
        return len(self.stats()["streams"])

    def queued(self) -> int:
        """Requests that wait for a slot, as /admin/stats counts them."""
        count: int = self.stats()["queued"]
        return count

    def worker_pid(self) -> int:
        """The GPU worker's process id, as the service reports it."""
        pid: int = self.stats()["worker"]["pid"]
        return pid

    def web_pids(self) -> set[int]:
        """The service's child processes but the GPU worker."""
        return children_of(self.process.pid) - {self.worker_pid()}

    def wait_serving(
        self, web_workers: int, timeout_s: float = START_TIMEOUT_S, headers: Mapping[str, str] | None = None
    ) -> set[int]:
        """Wait until `web_workers` different web workers have answered; their process ids.

        The kernel hands every new connection to one of them.
        """
        seen: set[int] = set()

        def all_answer() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                url = f"{self.url}/admin/stats"
                answer = httpx.get(url, headers=headers, timeout=2, trust_env=False, verify=NO_TLS)
                if answer.status_code == httpx.codes.OK:
                    seen.add(answer.json()["web_pid"])
            return len(seen) == web_workers

        eventually(all_answer, timeout_s, f"{web_workers} web workers answering", pause_s=START_PAUSE_S)
        return seen

    def speech(self, text: str, **fields: Any) -> httpx.Response:
        """The whole answer of POST /v1/audio/speech, whatever its status."""
        return self.http.post("/v1/audio/speech", json={"input": text, **fields})

    @contextlib.contextmanager
    def stream(self, text: str, **fields: Any) -> Iterator[httpx.Response]:
        """The answer of POST /v1/audio/speech while it arrives."""
        with self.http.stream("POST", "/v1/audio/speech", json={"input": text, **fields}) as answer:
            yield answer

    def stop(self, timeout_s: float = 45) -> int:
        """Send SIGTERM and wait; the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Kill every process of the service that still runs."""
        self.http.close()
        for pid in [*children_of(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def slow_reader(service: Service, text: str, **fields: object) -> socket.socket:
    """A client that requests speech over a bare socket with a small buffer, and reads nothing."""
    request = httpx.Request("POST", service.url + "/v1/audio/speech", json={"input": text, **fields})
    headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", service.port))
        connection.sendall(f"POST /v1/audio/speech HTTP/1.1\r\n{headers}\r\n".encode() + request.content)
        stack.pop_all()
    return connection


@contextlib.contextmanager
def running_service(
    directory: Path, *, start_timeout_s: float = START_TIMEOUT_S, root: Path = ROOT, **settings: object
) -> Iterator[Service]:
    """A ready service. At the end it stops at SIGTERM with exit code 0, unless the test failed."""
    service = Service(directory, root=root, **settings)
    try:
        yield service.wait_ready(start_timeout_s)
        assert service.stop() == 0
    finally:
        service.kill()


@contextlib.contextmanager
def running_worker(directory: Path, **settings: object) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`python -m gpu_worker` on its own: its TTS_WORKER_URL and its process, which ends at SIGTERM with exit code 0."""
    private = directory / "run"
    private.mkdir(mode=0o700)
    url = f"ipc://{private}/worker.ipc"
    variables = environment(VOICES_DIR=directory / "worker-voices", WORKER_URL=url, **settings)
    worker = subprocess.Popen([sys.executable, "-m", "gpu_worker"], cwd=directory, env=variables)
    try:
        yield url, worker
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()
