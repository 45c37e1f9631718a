"""The real service for tests: `python -m server` on a free port of the loopback, with everything it starts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from tests.ports import free_port

ROOT: Final = Path(__file__).resolve().parents[2]
START_TIMEOUT_S: Final = 30.0

SPIN_S: Final = 0.1
"""Of a core's time, which is what `stretched` asks for to see how long it takes to get it."""


def eventually(holds: Callable[[], object], timeout_s: float, what: str | Callable[[], str]) -> float:
    """Wait until `holds()` is true, looking every 10 ms; how many seconds that took. AssertionError after the limit.

    `what` is waited for; a function is asked for it only once it has not come.
    """
    began = time.monotonic()
    while not holds():
        waited = time.monotonic() - began
        assert waited < timeout_s, f"not within {timeout_s} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.01)  # between two looks at another process, never in the place of one
    return time.monotonic() - began


def stretched(limit_s: float) -> float:
    """`limit_s` on a machine that is free; on a busy one longer, by as much as it makes this process wait."""
    wall, own = time.monotonic(), time.process_time()
    while time.process_time() - own < SPIN_S:
        pass
    return limit_s * max(1.0, (time.monotonic() - wall) / SPIN_S)


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
    """What the process has in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Service:
    """One running service; `settings` are TTS_* variables without the prefix."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"service-{self.port}.log"
        defaults: Mapping[str, object] = {
            "PORT": self.port,
            "VOICES_DIR": directory / "voices",
            "MAX_INPUT_CHARS": 100_000,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
        environment.update({f"TTS_{name}": str(value) for name, value in {**defaults, **settings}.items()})
        environment["PYTHONPATH"] = str(ROOT)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server"], cwd=directory, env=environment, stdout=log, stderr=log
            )
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> "Service":
        """Wait until /ready says 200; how the service died, if it did."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.is_ready()

        eventually(ready, timeout_s, lambda: f"ready; the log says:\n{self.log.read_text()}")
        return self

    def is_ready(self) -> bool:
        """Whether /ready says 200 now."""
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/ready", timeout=2).status_code == httpx.codes.OK
        return False

    def stats(self) -> Any:
        """The body of /admin/stats."""
        answer = self.http.get("/admin/stats")
        answer.raise_for_status()
        return answer.json()

    def worker_pid(self) -> int:
        """The GPU worker's process id, as the service reports it."""
        pid: int = self.stats()["worker"]["pid"]
        return pid

    def web_pids(self) -> set[int]:
        """The processes that the service started and that are not the GPU worker."""
        return children_of(self.process.pid) - {self.worker_pid()}

    def wait_serving(self, web_workers: int, timeout_s: float = START_TIMEOUT_S) -> set[int]:
        """Wait until so many web workers answer, each connection going to any of them; their process ids."""
        seen: set[int] = set()

        def all_answer() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{self.url}/admin/stats", timeout=2, trust_env=False)
                if answer.status_code == httpx.codes.OK:
                    seen.add(answer.json()["web_pid"])
            return len(seen) == web_workers

        eventually(all_answer, timeout_s, f"{web_workers} web workers answering")
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
        """SIGTERM, and the exit code."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End whatever is left of it."""
        self.http.close()
        for pid in [*children_of(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
