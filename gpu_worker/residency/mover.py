"""The thread that moves models: it opens, offloads, restores and closes engines, and measures around every move.

What to move is decided elsewhere (residency.py); how a move went is told through `report`.
A move that fails leaves nothing behind that was not there before it.
"""

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence

from gpu_worker.engines.base import Engine, JobError, Memory
from gpu_worker.engines.faults import BrokenDeviceError, is_broken_device
from gpu_worker.residency.memory import MemoryProbe, is_out_of_memory
from gpu_worker.residency.moves import MoverFailed, Place, Transition, TransitionDone, TransitionFailed
from shared.catalog import ModelSpec

_log = logging.getLogger(__name__)


class Mover:
    """Carries out one move after the other on a thread of its own.

    `open_engine` makes the engine of one of `specs`; a JobError it raises is reported as it is.
    `report` is called from the loader's thread.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        open_engine: Callable[[ModelSpec], Engine],
        probe: MemoryProbe,
        report: Callable[[TransitionDone | TransitionFailed | MoverFailed], None],
    ) -> None:
        self._specs = {spec.id: spec for spec in specs}
        self._open_engine = open_engine
        self._probe = probe
        self._report = report
        self._engines: dict[str, Engine] = {}
        self._moves: queue.SimpleQueue[Transition | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, move: Transition) -> None:
        """Carry out `move` as soon as those before it have ended."""
        self._moves.put(move)

    def close(self, timeout_s: float | None = None) -> None:
        """Let the move in flight end, close every engine and end the thread, waiting for `timeout_s` at most.

        The moves submitted before are still carried out and reported.
        """
        self._moves.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (move := self._moves.get()) is not None:
            try:
                report = self._carry_out(move)
            except Exception as error:  # noqa: BLE001 -- whatever it was, somebody has to hear that no move will end
                # A broken device, which no other move would get any further with, or a probe that cannot measure.
                _log.exception("%s of %s has ended the loader", move.kind, move.model)
                self._report(MoverFailed(_words(error)))
                return
            self._report(report)
        for model in list(self._engines):
            self._close(model)

    def _carry_out(self, move: Transition) -> TransitionDone | TransitionFailed:
        began = time.monotonic()
        before_bytes = self._probe.device().ours_bytes
        failed = self._attempt(move)
        if failed is not None:
            left = self._undo(move)
            self._probe.reclaim(collect=True)
            return TransitionFailed(move=move, error=failed, left=left)
        # Only what is closed can leave garbage in cycles; the others' streams need not pay for a collection otherwise.
        self._probe.reclaim(collect=move.kind == "drop")
        engine = self._engines.get(move.model)
        return TransitionDone(
            move=move,
            engine=engine if move.kind in {"load", "restore"} else None,
            memory=engine.memory() if engine is not None else Memory(),
            before_bytes=before_bytes,
            after_bytes=self._probe.device().ours_bytes,
            seconds=time.monotonic() - began,
        )

    def _attempt(self, move: Transition) -> JobError | None:
        try:
            self._move(move)
        except JobError as error:
            _log.warning("%s of %s failed: %s", move.kind, move.model, error.message, exc_info=True)
            _let_go(error)
            return JobError(error.code, error.message, param=error.param, retry_after_s=error.retry_after_s)
        except Exception as error:  # whatever an engine raises is this move's failure and no more
            if is_broken_device(error):
                raise BrokenDeviceError(str(error)) from error
            _log.exception("%s of %s failed", move.kind, move.model)
            _let_go(error)
            if is_out_of_memory(error):
                return JobError("insufficient_vram", f"memory ran out during the {move.kind} of {move.model}: {error}")
            return JobError("model_unavailable", f"the {move.kind} of {move.model} failed: {_words(error)}")
        return None

    def _move(self, move: Transition) -> None:
        match move.kind:
            case "load":
                self._engines[move.model] = self._open_engine(self._specs[move.model])
            case "restore":
                self._engines[move.model].restore()
            case "offload":
                self._engines[move.model].offload()
            case "drop":
                self._close(move.model)

    def _undo(self, move: Transition) -> Place:
        """Bring a model whose move failed to a place that is known, and say which."""
        engine = self._engines.get(move.model)
        if engine is not None and move.kind == "restore":
            try:
                engine.offload()
            except Exception:  # noqa: BLE001 -- an engine that fails twice is dropped, whatever it raised
                _log.exception("%s can be neither restored nor offloaded again, and is dropped", move.model)
            else:
                return "offloaded"
        self._close(move.model)
        return "absent"

    def _close(self, model: str) -> None:
        """Close the model's engine; one that will not be closed is forgotten all the same."""
        engine = self._engines.pop(model, None)
        if engine is None:
            return
        try:
            engine.close()
        except Exception:  # noqa: BLE001 -- its memory is given up either way
            _log.exception("%s could not be closed cleanly", model)


def _let_go(error: BaseException) -> None:
    """Empty the frames that `error` and its causes went through, whoever still keeps the error (a log's handler may).

    They hold every local variable, the tensors of half a load among them, and nothing of that would be freed.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
