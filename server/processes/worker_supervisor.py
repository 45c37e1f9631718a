"""The GPU worker as a child process: started, watched, started again when it dies, stopped with the service.

`Supervisor` owns that process. It does not talk to the worker and does not know what the worker does.
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

from server.processes.restarts import RestartPauses, death_cause

FINAL_EXIT_CODES: Final = {2: "its settings are wrong", 3: "another worker already serves its address"}
"""Exit codes of a worker that would end the same way again."""

_KILL_TIMEOUT_S: Final = 5.0

log = structlog.get_logger(__name__)


class Supervisor:
    """Keeps one worker process alive from `start` to `stop`; the same thread calls both.

    `command` begins with the path of a program. `--restarts N` is added to it: N workers ran before this one.
    The worker runs in a session of its own, so that a terminal's Ctrl-C reaches the service alone
    and streams can be drained before the worker is stopped.
    The watching thread calls `on_final` after a worker that must not be started again; see `exit_code`.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        stop_timeout_s: float,
        on_final: Callable[[], None],
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
        self._exit_code: int | None = None
        # The thread gets the caller's context, which names the process in each log line.
        in_context = contextvars.copy_context().run
        self._thread = threading.Thread(target=in_context, args=(self._watch,), name="supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """The worker's process id; None while no worker runs."""
        return self._pid

    @property
    def exit_code(self) -> int | None:
        """The exit code of a worker that was not started again; None if there was none."""
        return self._exit_code

    def start(self) -> None:
        """Start the worker and watch it; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Let the worker drain, kill it after `stop_timeout_s`, and return when it is gone."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        self._thread.join(self._stop_timeout_s)
        if self._thread.is_alive():
            log.warning("worker_killed", reason="it did not stop in time", pid=self.pid)
            self._signal(signal.SIGKILL)
            self._thread.join(_KILL_TIMEOUT_S)

    def _watch(self) -> None:
        pauses = RestartPauses()
        restarts = 0
        while True:
            started = self._clock()
            code = self._run_once(restarts)
            if self._stopping.is_set():
                return
            if code in FINAL_EXIT_CODES:
                log.critical("worker_cannot_run", reason=FINAL_EXIT_CODES[code], exit_code=code)
                self._exit_code = code
                self._on_final()
                return
            pause_s = pauses.after_death(self._clock() - started)
            log.error("worker_died", cause=death_cause(code), restart_in_s=pause_s)
            if self._stopping.wait(pause_s):
                return
            restarts += 1

    def _run_once(self, restarts: int) -> int | None:
        """Start a worker and wait for its end; returns its exit code, None if no worker was started."""
        with self._lock:
            if self._stopping.is_set():
                return None
            try:
                pid = self._spawn(restarts)
            except OSError as error:
                log.error("worker_not_started", reason=str(error))  # noqa: TRY400 -- no traceback helps
                return None
            self._pid = pid
        log.info("worker_started", pid=pid, restarts=restarts)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with self._lock:  # waitpid frees the number: without the lock, `_signal` could hit another process with it
            _, status = os.waitpid(pid, 0)
            self._pid = None
        return os.waitstatus_to_exitcode(status)

    def _spawn(self, restarts: int) -> int:
        """Start a worker and return its pid.

        Not with subprocess: a web worker that granian forks at that moment would inherit subprocess's pipe for errors,
        and `Popen` would wait for that pipe as long as the web worker lives.
        """
        no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        command = [*self._command, "--restarts", str(restarts)]
        return os.posix_spawn(command[0], command, self._environ, file_actions=[no_input], setsid=True)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker; SIGKILL also to the processes that the worker started."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._pid is None:
                return
            if number == signal.SIGKILL:
                os.killpg(self._pid, number)
            else:
                os.kill(self._pid, number)
