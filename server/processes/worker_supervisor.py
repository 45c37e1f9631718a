"""The GPU worker as a child process: started, watched, started again when it dies or hangs, stopped with the service.

`Supervisor` owns that process. It does not know what the worker does. All that it hears of the worker is one byte
a second through a pipe: STARTING from the first turn of the synthesis loop on, READY once the models are preloaded.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, Final

import structlog

from server.engine import Outage
from server.processes.restarts import RestartPauses, death_cause
from server.processes.watchdog import STACKS_TIMEOUT_S, Silence
from shared.protocol import READY

FINAL_EXIT_CODES: Final = {2: "its settings are wrong", 3: "another worker already serves its address"}
"""Exit codes of a worker that would end the same way again."""

FIRST_START_S: Final = 10.0
"""The estimate of a start that was never measured: an engine of published size takes 5 to 25 s."""

HUGE_PAGES: Final = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Makes glibc ask the kernel for pages of 2 MiB. It reads this when a process starts, so the GPU worker cannot set it.

A CPU reads all weights for every frame. CPU time of a frame (random 0.6B, int8, one thread of a Xeon, busy machine, two
processes each in turns): 308 to 329 ms without, 268 to 309 ms with. Resident memory grew by 1 %.
"""

_KILLED_FROM_OUTSIDE: Final = "the kernel does so when memory runs out: its log (dmesg) says so"

_KILL_TIMEOUT_S: Final = 5.0

_POLL_S: Final = 0.5
_STOP_POLL_S: Final = 0.1

log = structlog.get_logger(__name__)


class Supervisor:
    """Keeps one worker process alive from `start` to `stop`; the same thread calls both.

    `command` begins with the path of a program; `environ()` is the environment of a worker that starts now.
    `--restarts N` is added to it: N workers ran before this one,
    and `--heartbeat FD`: the pipe that the worker writes its bytes to.
    A worker whose bytes stop for `timeout_s` is killed, after it was made to write the stacks of its threads.
    That counts from its first byte: how long a start may take is not limited.
    The worker runs in a session of its own, so that a terminal's Ctrl-C reaches the service alone
    and streams can be drained before the worker is stopped.
    The watching thread calls `on_final` after a worker that must not be started again; see `exit_code`.
    It calls `on_outage` at the start and at each death, with what clients should know until the worker is back.
    An OSError of `on_outage` is logged.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Callable[[], Mapping[str, str]],
        *,
        timeout_s: float,
        stop_timeout_s: float,
        on_final: Callable[[], None],
        on_outage: Callable[[Outage], None] = lambda _outage: None,
        is_hurried: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = list(command)
        self._environ = environ
        self._timeout_s = timeout_s
        self._hang_cause = f"no answer for {timeout_s:.0f} s"
        self._stop_timeout_s = stop_timeout_s
        self._on_final = on_final
        self._on_outage = on_outage
        self._is_hurried = is_hurried
        self.start_s = FIRST_START_S
        """Seconds from the last start to READY, as far as any was measured."""
        self._clock = clock
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._stopping = threading.Event()
        self._exit_code: int | None = None
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

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
        """Let the worker drain, kill it after `stop_timeout_s` or once `is_hurried()`, and return when it is gone."""
        self._stopping.set()
        if self._thread.ident is None:
            return  # never started
        self._signal(signal.SIGTERM)
        until = time.monotonic() + self._stop_timeout_s
        while self._thread.is_alive() and (left_s := until - time.monotonic()) > 0 and not self._is_hurried():
            self._thread.join(min(left_s, _STOP_POLL_S))
        if self._thread.is_alive():
            reason = "the service was told to stop at once" if self._is_hurried() else "it did not stop in time"
            log.warning("worker_killed", reason=reason, pid=self.pid)
            self._signal(signal.SIGKILL)
            self._thread.join(_KILL_TIMEOUT_S)

    def _watch(self) -> None:
        pauses = RestartPauses()
        restarts = 0
        self._report_outage("is starting")
        while True:
            started = self._clock()
            code, hung = self._run_once(restarts)
            if self._stopping.is_set():
                return
            if code in FINAL_EXIT_CODES:
                log.critical("worker_cannot_run", reason=FINAL_EXIT_CODES[code], exit_code=code)
                self._exit_code = code
                self._on_final()
                return
            pause_s = pauses.after_death(self._clock() - started)
            cause = self._hang_cause if hung else death_cause(code)
            hint = {"hint": _KILLED_FROM_OUTSIDE} if code == -signal.SIGKILL and not hung else {}
            log.error("worker_died", cause=cause, restart_in_s=pause_s, **hint)
            self._report_death(cause, pause_s)
            if self._stopping.wait(pause_s):
                return
            restarts += 1

    def _report_death(self, cause: str, pause_s: float) -> None:
        self._report_outage(f"has died ({cause}) and is being restarted", pause_s)

    def _report_outage(self, what: str, pause_s: float = 0.0) -> None:
        outage = Outage(reason=f"The GPU worker {what}.", back_at=time.time() + pause_s + self.start_s)
        try:
            self._on_outage(outage)
        except OSError as error:  # a full disk must not keep the GPU worker from its restart
            log.warning("outage_not_written", reason=str(error))

    def _run_once(self, restarts: int) -> tuple[int | None, bool]:
        """Start a worker and wait for its end: its exit code, and whether it was killed because it hung.

        The exit code is None if no worker was started.
        """
        heartbeat, theirs = os.pipe()
        with contextlib.closing(open(heartbeat, "rb", buffering=0)) as pipe:  # noqa: PTH123 -- a descriptor
            with self._lock:
                try:
                    if self._stopping.is_set():
                        return None, False
                    pid = self._spawn(restarts, theirs)
                except OSError as error:
                    log.error("worker_not_started", reason=str(error))  # noqa: TRY400 -- no traceback helps
                    return None, False
                finally:
                    os.close(theirs)
                self._pid = pid
            log.info("worker_started", pid=pid, restarts=restarts)
            hung = self._wait_for_end(pid, pipe)
        if hung:
            self._kill_hung(pid)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with self._lock:  # waitpid frees the number: without the lock, `_signal` could hit another process with it
            _, status = os.waitpid(pid, 0)
            self._pid = None
        return os.waitstatus_to_exitcode(status), hung

    def _wait_for_end(self, pid: int, pipe: BinaryIO) -> bool:
        """Wait until the worker has ended (False), or has been silent for `timeout_s` after its first byte (True)."""
        started = self._clock()
        silence, ready = Silence(started), False
        process = os.pidfd_open(pid)
        try:
            while True:
                readable, _, _ = select.select([process, pipe.fileno()], [], [], _POLL_S)
                if process in readable:
                    return False
                now = self._clock()
                if readable:
                    silence.heard(now)
                    if READY in pipe.read(4096) and not ready:
                        ready, self.start_s = True, now - started
                        log.info("worker_speaks", pid=pid, start_s=round(self.start_s, 1))
                if silence.exceeds(self._timeout_s, now) and not self._stopping.is_set():  # `stop` has its own limit
                    return True
        finally:
            os.close(process)

    def _kill_hung(self, pid: int) -> None:
        """Let the worker write the stacks of its threads, also if it is stopped, then kill it."""
        log.error("worker_hangs", pid=pid, silent_s=self._timeout_s, stacks="follow on stderr")
        self._signal(signal.SIGUSR2)
        self._signal(signal.SIGCONT)
        self._stopping.wait(STACKS_TIMEOUT_S)
        self._report_death(self._hang_cause, 0.0)  # its death breaks streams, whose clients may ask again at once
        self._signal(signal.SIGKILL)

    def _spawn(self, restarts: int, heartbeat: int) -> int:
        """Start a worker and return its pid.

        Not with subprocess: a web worker that granian forks at that moment would inherit subprocess's pipe for errors,
        and `Popen` would wait for that pipe as long as the web worker lives.
        """
        no_input = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        command = [*self._command, "--restarts", str(restarts), "--heartbeat", str(heartbeat)]
        os.set_inheritable(heartbeat, True)
        return os.posix_spawn(command[0], command, self._environ(), file_actions=[no_input], setsid=True)

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker; SIGKILL also to the processes that the worker started."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._pid is None:
                return
            if number == signal.SIGKILL:
                os.killpg(self._pid, number)
            else:
                os.kill(self._pid, number)
