"""The GPU worker as a child process: started, watched, started again when it dies, stopped with the service.

It owns that process and nothing else: it neither speaks with the worker nor knows what it does.
"""

import contextlib
import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog

FINAL_EXIT_CODES: Final = {2: "its settings are wrong", 3: "another worker already serves its address"}
"""Exit codes of the worker that starting it again cannot change."""

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
SETTLED_S: Final = 60.0
"""A worker that lived this long had started well: its death is a new event, and the next start does not wait."""

_KILL_GRACE_S: Final = 5.0

log = structlog.get_logger(__name__)


class Supervisor:
    """Keeps one worker process alive from `start` to `stop`, which are called by the same thread.

    `command` begins with the path of a program; `--restarts N` behind it says how many workers there were before.
    The worker runs in a session of its own, so that a terminal's Ctrl-C reaches the service alone
    and streams can be drained before the worker is stopped.
    `on_final` is called, by the watching thread, with the exit code of a worker that must not be started again.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        stop_timeout_s: float,
        on_final: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = list(command)
        self._environ = dict(environ)
        self._stop_timeout_s = stop_timeout_s
        self._on_final = on_final
        self._clock = clock
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._stopping = threading.Event()
        self._restarts = 0
        self._exit_code: int | None = None
        # With the caller's context, whose log lines say which process they come from.
        in_context = contextvars.copy_context().run
        self._thread = threading.Thread(target=in_context, args=(self._watch,), name="supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """The worker's process id; None between two of them."""
        return self._pid

    @property
    def restarts(self) -> int:
        """How often the worker was started again."""
        return self._restarts

    @property
    def exit_code(self) -> int | None:
        """The exit code for which the worker was given up, if it was."""
        return self._exit_code

    def start(self) -> None:
        """Start the worker and watch over it; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Let the worker drain, kill it if it takes too long, and return when it is gone."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        self._thread.join(self._stop_timeout_s)
        if self._thread.is_alive():
            log.warning("the GPU worker did not stop in time and is killed", pid=self.pid)
            self._signal(signal.SIGKILL)
            self._thread.join(_KILL_GRACE_S)

    def _watch(self) -> None:
        quick_deaths = 0
        while True:
            started = self._clock()
            code = self._run_once()
            if self._stopping.is_set():
                return
            if code in FINAL_EXIT_CODES:
                log.critical("the GPU worker cannot run", reason=FINAL_EXIT_CODES[code], exit_code=code)
                self._exit_code = code
                self._on_final(code)
                return
            quick_deaths = 0 if self._clock() - started >= SETTLED_S else quick_deaths + 1
            pause_s = pause_before_restart(quick_deaths)
            log.error("the GPU worker died; it is started again", cause=cause_of(code), pause_s=pause_s)
            if self._stopping.wait(pause_s):
                return
            self._restarts += 1

    def _run_once(self) -> int | None:
        """The exit code of one life of the worker; None where there was none."""
        with self._lock:
            if self._stopping.is_set():
                return None
            try:
                pid = self._spawn()
            except OSError as error:
                log.error("the GPU worker cannot be started", reason=str(error))  # noqa: TRY400 -- no traceback helps
                return None
            self._pid = pid
        log.info("the GPU worker was started", pid=pid, restarts=self._restarts)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with self._lock:  # only now does the number become free, and nobody can signal a stranger by it
            _, status = os.waitpid(pid, 0)
            self._pid = None
        return os.waitstatus_to_exitcode(status)

    def _spawn(self) -> int:
        """The pid of a new worker.

        Not subprocess: its pipe for errors would be inherited by a web worker that granian forks at that moment,
        and be waited on for as long as that one lives.
        """
        no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        command = [*self._command, "--restarts", str(self._restarts)]
        return os.posix_spawn(command[0], command, self._environ, file_actions=[no_input], setsid=True)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker and, with SIGKILL, to whatever it started."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._pid is None:
                return
            if number == signal.SIGKILL:
                os.killpg(self._pid, number)
            else:
                os.kill(self._pid, number)


def pause_before_restart(quick_deaths: int) -> float:
    """Seconds to wait after `quick_deaths` deaths in a row: none after the first, then 0.5, 1, 2 … 30."""
    if quick_deaths <= 1:
        return 0.0
    return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(quick_deaths - 2, 16)))


def cause_of(code: int | None) -> str:
    """What a process ended by, in words; None where it could not be started."""
    if code is None:
        return "it could not be started"
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
