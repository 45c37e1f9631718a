"""The one thread that loads, offloads, restores and drops models, and measures around every transition.

It decides nothing (see policy.py); the result of each transition goes to `report`.
A transition that fails leaves nothing behind that was not there before it.
"""

import time
import traceback
from collections.abc import Callable, Sequence

import structlog

from gpu_worker.engines.base import Engine, JobError, Memory
from gpu_worker.engines.faults import BrokenDeviceError, is_broken_device, is_out_of_memory
from gpu_worker.residency.memory import MemoryProbe
from gpu_worker.residency.models import (
    TARGET_STATE,
    ModelState,
    MoverFailed,
    Transition,
    TransitionDone,
    TransitionFailed,
)
from gpu_worker.serial_thread import SerialThread
from shared.catalog import ModelSpec

log = structlog.get_logger(__name__)


class Mover(SerialThread[Transition]):
    """Carries out one transition after the other on a thread of its own.

    `open_engine` makes the engine of one of `specs`; a JobError that it raises is reported unchanged.
    `report` is called on the mover thread. After a MoverFailed nothing is moved any more.
    `close` carries out what was submitted and closes every engine.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        open_engine: Callable[[ModelSpec], Engine],
        probe: MemoryProbe,
        report: Callable[[TransitionDone | TransitionFailed | MoverFailed], None],
    ) -> None:
        super().__init__(
            "mover",
            lambda transition: report(self._undisturbed(transition)),
            # A broken device, with which no other transition would succeed, or a probe that cannot measure.
            on_error=lambda error: report(MoverFailed(_described(error))),
            on_close=self._close_all,
        )
        self._specs = {spec.id: spec for spec in specs}
        self._open_engine = open_engine
        self._probe = probe
        self._engines: dict[str, Engine] = {}

    def _undisturbed(self, transition: Transition) -> TransitionDone | TransitionFailed:
        with self._probe.moving():
            return self._carry_out(transition)

    def _carry_out(self, transition: Transition) -> TransitionDone | TransitionFailed:
        began = time.monotonic()
        before_bytes = self._probe.device().ours_bytes
        error = self._attempt(transition)
        if error is not None:
            state = self._undo(transition)
            self._probe.reclaim(collect=True)
            return TransitionFailed(transition=transition, error=error, state=state)
        # Only a closed engine can leave garbage in cycles; other models' streams need not pay for a collection.
        self._probe.reclaim(collect=transition.kind == "drop")
        engine = self._engines.get(transition.model)
        return TransitionDone(
            transition=transition,
            engine=engine if TARGET_STATE[transition.kind] is ModelState.RESIDENT else None,
            memory=engine.memory() if engine is not None else Memory(),
            before_bytes=before_bytes,
            after_bytes=self._probe.device().ours_bytes,
            seconds=time.monotonic() - began,
        )

    def _attempt(self, transition: Transition) -> JobError | None:
        kind, model = transition.kind, transition.model
        try:
            self._move(transition)
        except JobError as error:
            log.warning("transition_failed", kind=kind, model=model, reason=error.message, exc_info=True)
            _clear_frames(error)
            return JobError(error.code, error.message, param=error.param, retry_after_s=error.retry_after_s)
        except Exception as error:  # whatever an engine raises is this transition's failure and no more
            if is_broken_device(error):
                raise BrokenDeviceError(str(error)) from error
            log.exception("transition_failed", kind=kind, model=model)
            _clear_frames(error)
            if is_out_of_memory(error):
                return JobError("insufficient_vram", f"memory ran out during the {kind} of {model}: {error}")
            return JobError("model_unavailable", f"the {kind} of {model} failed: {_described(error)}")
        return None

    def _move(self, transition: Transition) -> None:
        match transition.kind:
            case "load":
                self._engines[transition.model] = self._open_engine(self._specs[transition.model])
            case "restore":
                self._engines[transition.model].restore()
            case "offload":
                self._engines[transition.model].offload()
            case "drop":
                self._close_engine(transition.model)

    def _undo(self, transition: Transition) -> ModelState:
        """Bring the model to a known state after a failed transition, and return that state."""
        engine = self._engines.get(transition.model)
        if engine is not None and transition.kind == "restore":
            try:
                engine.offload()
            except Exception:
                log.exception("restore_not_undone", model=transition.model)
            else:
                return ModelState.OFFLOADED
        self._close_engine(transition.model)
        return ModelState.ABSENT

    def _close_engine(self, model: str) -> None:
        """Close the model's engine; an engine that raises is dropped all the same."""
        engine = self._engines.pop(model, None)
        if engine is None:
            return
        try:
            engine.close()
        except Exception:
            log.exception("engine_close_failed", model=model)

    def _close_all(self) -> None:
        for model in list(self._engines):
            self._close_engine(model)


def _clear_frames(error: BaseException) -> None:
    """Empty the frames of `error` and its causes: a log handler may keep the error.

    The frames hold every local variable, such as the tensors of half a load, and none of that memory would be freed.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
