"""The synthesis loop: commands, admission, steps, stalled readers, out of memory, drain.

Every turn handles commands, admits requests, steps every runnable engine, delivers the events, and starts transitions.
Worker owns all requests, on one thread; queues are all it shares with the other threads.
It owns no socket (see `transport`), writes no voice (see `voices`), and decides neither which request is next
(see `scheduler`) nor which model is where (see `residency`).
"""

import queue
from collections.abc import Callable, Sequence
from typing import Final, assert_never

import msgspec
import structlog

from gpu_worker.control import ControlHandler
from gpu_worker.engines.base import Done, Event, Fault, Job, JobError, Pcm, Reference
from gpu_worker.engines.faults import BrokenDeviceError, is_broken_device, is_out_of_memory
from gpu_worker.requests import Cancelled, Outcome, Request, RequestState, Sink
from gpu_worker.residency import (
    Downloaded,
    FilesChecked,
    MoverFailed,
    Progress,
    Refusal,
    Report,
    Residency,
    TransitionDone,
    TransitionFailed,
)
from gpu_worker.scheduler import Scheduler
from gpu_worker.stats import Stats
from gpu_worker.transport import Incoming, PeerGone, TransportEvent, TransportFailed
from gpu_worker.voices import VoiceStore, VoiceWritten
from shared.catalog import ModelSpec
from shared.protocol import (
    VERSION,
    Call,
    Cancel,
    Credit,
    FromWeb,
    Hello,
    Message,
    Ping,
    Pong,
    Snapshot,
    Speak,
    Welcome,
)

IDLE_TURN_S: Final = 0.05
"""How long an idle loop waits for a command before it looks at the clock again."""

UNKNOWN_SLOTS: Final = 8
"""The slots of a model that has not been resident yet: a model has as many on a CPU, and seldom fewer on a GPU."""

log = structlog.get_logger(__name__)

Send = Callable[[bytes, Message, bytes | None], None]


class Drain(msgspec.Struct, frozen=True):
    """Finish the running requests, refuse all others, then end; `deadline_s` seconds later, end anyway."""

    deadline_s: float


class Wake(msgspec.Struct, frozen=True):
    """End the wait for a command: an engine may have become runnable."""


Command = TransportEvent | Report | MoverFailed | VoiceWritten | Drain | Wake
"""Everything that reaches the loop through its inbox."""


class Worker:
    """One synthesis loop over all models. `run` returns when a Drain has been carried out."""

    def __init__(
        self,
        *,
        catalog: list[ModelSpec],
        send: Send,
        inbox: "queue.SimpleQueue[Command]",
        scheduler: Scheduler,
        residency: Residency,
        voices: VoiceStore,
        stats: Stats,
        max_concurrency: int,
        stall_timeout_s: float,
        clock: Callable[[], float],
        preload: Sequence[str] = (),
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        self._specs = {spec.id: spec for spec in catalog}
        self._send = send
        self._inbox = inbox
        self._scheduler = scheduler
        self._residency = residency
        self._voices = voices
        self._stats = stats
        self._max_concurrency = max_concurrency
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._on_turn = on_turn
        self._open: dict[tuple[bytes, str], Request] = {}  # by peer and request id; all that are not DONE
        self._running: dict[str, Request] = {}  # by job id; those that are RUNNING
        self._out_of_memory: set[str] = set()  # models whose next step is the second try
        self._slots_of: dict[str, int] = {}  # by model, as many as it had when it became resident
        self._drain_until: float | None = None
        residency.preload(preload)
        self._control = ControlHandler(
            specs=self._specs,
            residency=residency,
            voices=voices,
            submit=self._submit,
            check_model=self._check_model,
            clock=clock,
        )

    def run(self) -> None:
        """Work until drained. Raises BrokenDeviceError if only a new process can help.

        Whatever it raises, it has failed all requests and calls before.
        """
        try:
            while not self._is_drained():
                self._on_turn()
                self.turn()
            for request in list(self._open.values()):
                self._finish(request, _shutting_down())
            self._control.fail_pending(_shutting_down())
        except Exception as error:
            self._fail_everything(error)
            raise

    def turn(self) -> None:
        """One round: commands, admission, one step of every runnable engine, transitions.

        Transitions start between the steps and the next commands: a busy model may be idle for just that moment,
        and others may be waiting for its room.
        """
        self._handle_commands()
        self._admit()
        self._step_engines()
        self._end_stalled()
        for refusal in self._residency.advance():
            self._refuse(refusal)
        self._control.answer_finished()

    # --- commands --------------------------------------------------------------------------------------------------

    def _handle_commands(self) -> None:
        wait_s = 0.0 if self._runnable(self._stalled_jobs()) else IDLE_TURN_S
        try:
            command = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                self._dispatch(command)
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _dispatch(self, command: Command) -> None:
        match command:
            case Incoming(peer, message, payload):
                self._handle_message(peer, message, payload)
            case PeerGone(peer):
                self._forget_peer(peer)
            case TransitionDone() | TransitionFailed() | FilesChecked() | Downloaded() | Progress():
                self._handle_report(command)
            case MoverFailed(reason):
                raise BrokenDeviceError(reason)
            case VoiceWritten():
                self._control.on_voice_written(command)
            case Drain(deadline_s):
                self._begin_drain(deadline_s)
            case TransportFailed(reason):
                raise RuntimeError(f"this process can no longer be reached: {reason}")
            case Wake():
                pass
            case _:
                assert_never(command)

    def _handle_message(self, peer: bytes, message: FromWeb, payload: bytes | None) -> None:
        match message:
            case Hello():
                self._send(peer, self._welcome(), None)
            case Ping():
                snapshot = self._snapshot()
                self._send(peer, Pong(boot_id=snapshot.boot_id, snapshot=snapshot), None)
            case Speak():
                self._speak(peer, message, payload)
            case Credit(id=request_id, chunks=chunks):
                self._grant_credit(peer, request_id, chunks)
            case Cancel(id=request_id):
                self._cancel(peer, request_id)
            case Call():
                self._control.handle(peer, message, payload, lambda reply: self._send(peer, reply, None))
            case _:
                assert_never(message)

    def _speak(self, peer: bytes, speak: Speak, payload: bytes | None) -> None:
        sink = Sink(speak.id, lambda message, pcm: self._send(peer, message, pcm), speak.credit)
        try:
            reference = self._reference_of(speak, payload)
            self._submit(
                Request(
                    peer=peer,
                    id=speak.id,
                    client=speak.client,
                    model=speak.model,
                    sink=sink,
                    keep_alive_s=speak.keep_alive_s,
                    arrived_at=self._clock(),
                    job=Job(
                        id=f"{peer.hex()}-{speak.id}",
                        task=speak.task,
                        text=speak.text,
                        voice="" if speak.saved_voice else speak.voice,
                        language=speak.language,
                        instructions=speak.instructions,
                        reference=reference,
                        sampling=speak.sampling,
                        non_streaming_mode=speak.non_streaming_mode,
                    ),
                )
            )
        except JobError as error:
            self._stats.request_rejected()
            sink.failed(error)

    def _reference_of(self, speak: Speak, payload: bytes | None) -> Reference | None:
        if speak.saved_voice:
            saved = self._voices.load(speak.voice)
            if not speak.x_vector_only or saved.x_vector_only:
                return saved
            return msgspec.structs.replace(saved, key=f"{saved.key}/x-vector", x_vector_only=True)
        if payload is None:
            return None
        return Reference.of(payload, text=speak.reference_text, x_vector_only=speak.x_vector_only)

    def _grant_credit(self, peer: bytes, request_id: str, chunks: int) -> None:
        request = self._open.get((peer, request_id))
        if request is not None:
            request.grant(chunks, self._clock())
            if request.state is RequestState.DONE:
                del self._open[peer, request_id]

    def _cancel(self, peer: bytes, request_id: str) -> None:
        self._control.forget(peer, request_id)
        request = self._open.get((peer, request_id))
        if request is not None:
            self._finish(request, Cancelled())

    def _forget_peer(self, peer: bytes) -> None:
        self._control.forget(peer)
        for request in [request for request in self._open.values() if request.peer == peer]:
            self._finish(request, Cancelled())

    # --- models ----------------------------------------------------------------------------------------------------

    def _check_model(self, model: str) -> None:
        """Raise JobError if the model is unknown, or if the worker drains and takes no request any more."""
        if self._drain_until is not None:
            raise _shutting_down()
        if model not in self._specs:
            known = ", ".join(self._specs)
            raise JobError("model_not_found", f"there is no model {model!r}; there are {known}", param="model")

    def _handle_report(self, report: Report) -> None:
        if isinstance(report, TransitionDone | TransitionFailed):
            self._stats.transition_ended(report)
        refusal = self._residency.handle(report)
        if refusal is not None:
            self._refuse(refusal)
        if isinstance(report, TransitionDone):
            self._on_transition_done(report)

    def _on_transition_done(self, report: TransitionDone) -> None:
        model = report.transition.model
        log.info(
            "transition_done",
            model=model,
            kind=report.transition.kind,
            seconds=round(report.seconds, 3),
            before_mb=round(report.before_bytes / 2**20),
            after_mb=round(report.after_bytes / 2**20),
        )
        if model in self._residency.engines:
            self._slots_of[model] = self._residency.engines[model].capacity()
        self._control.answer_finished()  # before the next transition takes the model elsewhere
        for request in self._scheduler:
            if request.model == model:
                request.model_ready_at = self._clock()

    def _refuse(self, refusal: Refusal) -> None:
        """The model cannot become resident: fail the requests and calls that wait for it."""
        log.warning("model_load_refused", model=refusal.model, code=refusal.code, reason=refusal.message)
        error = JobError(refusal.code, refusal.message, param="model", retry_after_s=refusal.retry_after_s)
        for request in [request for request in self._scheduler if request.model == refusal.model]:
            self._finish(request, error)
        self._control.on_model_refused(refusal.model, error)

    # --- the life of a request -------------------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        """Queue a request, and start it at once if a slot is free; JobError if it cannot be queued."""
        self._check_model(request.model)
        if (request.peer, request.id) in self._open:
            raise JobError("invalid_value", f"there is a request {request.id!r} already")
        can_start, free_slots = self._can_start(request.model), self._free_slots(request.model)
        self._scheduler.submit(request, self._slots(), free_slots=free_slots, can_start=can_start)
        self._open[request.peer, request.id] = request
        self._residency.acquire(request.model)
        self._control.answer_finished()  # fail the unloads that the request prevents, even if it is over in a moment
        self._admit()

    def _admit(self) -> None:
        while (request := self._scheduler.next(self._can_start)) is not None:
            try:
                self._residency.engines[request.model].admit(request.job)
            except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
                self._admission_failed(request, error)
            else:
                self._running[request.job.id] = request
                self._stats.request_started()
                request.start(self._clock())

    def _can_start(self, model: str) -> bool:
        engine = self._residency.engines.get(model)
        if engine is None:
            return False
        if model in self._out_of_memory or self._residency.evicting:
            return False  # the request would take the memory that is being freed
        return len(self._running) < self._max_concurrency and engine.capacity() > 0

    def _admission_failed(self, request: Request, error: Exception) -> None:
        if isinstance(error, JobError):
            self._finish(request, error)
            return
        message = f"{request.model} could not take the request: {error}"
        if is_out_of_memory(error):
            self._stats.out_of_memory(request.model)
            if request.retried:
                self._finish(request, JobError("insufficient_vram", message, retry_after_s=5))
                return
            log.warning("out_of_memory_evicting_idle_models", model=request.model)
            request.retried = True
            self._residency.evict_idle()
            self._scheduler.put_back(request)
            return
        log.error("request_rejected_by_engine", model=request.model, request_id=request.id, exc_info=error)
        _raise_if_broken(error)
        self._finish(request, JobError("synthesis_failed", message))

    def _finish(self, request: Request, outcome: Outcome) -> None:
        """End `request`, in whichever state it is. No other method ends one.

        A request in the queue or in a slot leaves it, drops its reference on the model, and is counted: once.
        Speech that is complete but not sent stays open as DRAINING; a second outcome may end that early.
        """
        if request.state in {RequestState.QUEUED, RequestState.RUNNING}:
            self._release(request, outcome)
            self._stats.request_finished(request, outcome)
            if isinstance(outcome, JobError):
                log.info("request_failed", request_id=request.id, model=request.model, code=outcome.code)
        request.end(outcome, self._clock())
        if request.state is RequestState.DONE:
            del self._open[request.peer, request.id]

    def _release(self, request: Request, outcome: Outcome) -> None:
        """Take `request` out of the queue or its slot, and drop its reference on the model.

        Only a request that held a slot decides how long the model stays.
        """
        if request.state is RequestState.QUEUED:
            self._scheduler.remove(request)
            self._residency.abandon(request.model)
            return
        if not isinstance(outcome, Cancelled):
            self._scheduler.record_slot_time(self._clock() - (request.started_at or 0.0))
        model = request.model
        del self._running[request.job.id]
        engine = self._residency.engines[model]
        engine.cancel(request.job.id)
        self._residency.measured(model, engine.memory())
        if all(other.model != model for other in self._running.values()):
            self._out_of_memory.discard(model)  # there is no step left to retry
        self._residency.release(model, request.keep_alive_s)

    def _end_stalled(self) -> None:
        """Fail the requests whose reader took nothing for `stall_timeout_s`: a stalled request must not keep a slot."""
        now = self._clock()
        for request in list(self._open.values()):
            if not request.stalled:
                request.stalled_since = None
            elif request.stalled_since is None:
                request.stalled_since = now
            elif now - request.stalled_since > self._stall_timeout_s:
                message = f"nothing was read for {self._stall_timeout_s:.0f} s"
                self._finish(request, JobError("client_too_slow", message))

    # --- synthesis -------------------------------------------------------------------------------------------------

    def _step_engines(self) -> None:
        stalled = self._stalled_jobs()
        for model in self._runnable(stalled):
            try:
                events = self._residency.engines[model].step(stalled)
            except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
                self._recover(model, error)
                continue
            self._out_of_memory.discard(model)
            for event in events:
                self._deliver(event)

    def _deliver(self, event: Event) -> None:
        request = self._running.get(event.job_id)
        if request is None:
            return  # cancelled since
        match event:
            case Pcm(data=data):
                if request.first_audio_at is None:
                    self._stats.first_audio(request)
                request.push(data, self._clock())
            case Done():
                self._finish(request, event)
            case Fault(error=error):
                self._finish(request, error)
            case _:
                assert_never(event)

    def _recover(self, model: str, error: Exception) -> None:
        """The step of an engine failed as a whole: keep the process, and as many requests as possible.

        Out of memory: evict idle models and try the step once more; then fail the youngest request.
        Nothing can be evicted while a model is on its way to the device, so the second try comes at once then.
        A broken device (a CUDA error that sticks to the process): fail everything; a new process is needed.
        Anything else: fail the running requests of this engine; queued and later requests get a new engine.
        """
        requests = [request for request in self._running.values() if request.model == model]
        if is_out_of_memory(error) and requests:
            self._stats.out_of_memory(model)
            if model not in self._out_of_memory:
                log.warning("out_of_memory_evicting_idle_models", model=model)
                self._out_of_memory.add(model)
                self._residency.evict_idle()
                return
            youngest = max(requests, key=lambda request: request.started_at or 0.0)
            log.warning("out_of_memory_failing_youngest_request", model=model, request_id=youngest.id)
            message = f"{model}: the device's memory is used up: {error}"
            self._finish(youngest, JobError("insufficient_vram", message, retry_after_s=5))
            return
        log.error("engine_failed", model=model, exc_info=error)
        _raise_if_broken(error)
        for request in requests:
            self._finish(request, JobError("synthesis_failed", f"{model} failed while it was speaking: {error}"))
        self._residency.replace_engine(model)

    def _fail_everything(self, error: Exception) -> None:
        """Fail every request and call before the process ends. Engines and models may be broken: do not touch them."""
        if isinstance(error, BrokenDeviceError):
            failed = JobError("synthesis_failed", f"the device of the GPU worker broke: {error}")
        else:
            failed = JobError("synthesis_failed", f"the GPU worker broke: {type(error).__name__}: {error}")
        for request in self._open.values():
            request.sink.failed(failed)
        self._control.fail_pending(failed)

    def _stalled_jobs(self) -> set[str]:
        """The running jobs whose reader takes no more audio for now."""
        return {job_id for job_id, request in self._running.items() if request.stalled}

    def _runnable(self, stalled: set[str]) -> list[str]:
        """The models whose engine has work; a model that ran out of memory waits while idle models are evicted."""
        waiting = self._out_of_memory if self._residency.evicting else ()
        engines = self._residency.engines.items()
        return [model for model, engine in engines if model not in waiting and engine.runnable(stalled)]

    # --- the process -----------------------------------------------------------------------------------------------

    def _slots(self) -> int:
        """How many requests can hold a slot at once, going by the resident engines; without one, the maximum."""
        slots = sum(engine.capacity() for engine in self._residency.engines.values()) + len(self._running)
        return min(self._max_concurrency, slots) if self._residency.engines else self._max_concurrency

    def _free_slots(self, model: str) -> int:
        """How many more requests for the model can hold a slot. A model that is not resident has as many as before."""
        engine = self._residency.engines.get(model)
        free = engine.capacity() if engine is not None else self._slots_of.get(model, UNKNOWN_SLOTS)
        return min(free, self._max_concurrency - len(self._running))

    def _welcome(self) -> Welcome:
        snapshot = self._snapshot()
        return Welcome(
            version=VERSION,
            boot_id=snapshot.boot_id,
            catalog=list(self._specs.values()),
            snapshot=snapshot,
            settings=self._stats.settings,
        )

    def _snapshot(self) -> Snapshot:
        return self._stats.snapshot(
            accepting=self._drain_until is None,
            running=len(self._running),
            queued=len(self._scheduler),
            slots=self._slots(),
            models=self._residency.statuses(),
            offloaded_bytes=self._residency.offloaded_bytes(),
            cleanup=self._residency.last_cleanup,
            voices=self._voices.list(),
            requests=self._open.values(),
            preloading=self._residency.preloading,
        )

    def _begin_drain(self, deadline_s: float) -> None:
        if self._drain_until is not None:
            return
        log.info("draining", running=len(self._running), queued=len(self._scheduler))
        self._drain_until = self._clock() + deadline_s
        for request in list(self._scheduler):
            self._finish(request, _shutting_down())

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        if self._clock() > self._drain_until:
            return True
        return not self._open and not self._voices.writing


def _raise_if_broken(error: Exception) -> None:
    if is_broken_device(error):
        raise BrokenDeviceError(str(error)) from error


def _shutting_down() -> JobError:
    return JobError("shutting_down", "the GPU worker is shutting down", retry_after_s=5)
