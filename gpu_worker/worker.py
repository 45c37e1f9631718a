"""The synthesis loop: the readable centre of the process.

Every turn it takes commands, moves models, admits what fits, steps every engine that has work, and hands out events.
It owns all requests and all engines, in one thread; what it shares with the others are the queues they talk through.
It knows no sockets (see `transport`), loads no weights (see `loader`), sees to no model's files (see `fetcher`),
writes no voices (see `voice_writer`), and decides nothing about who is next (see `scheduler`)
or which model is where (see `residency`).
"""

import queue
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import structlog

from gpu_worker.control import ControlHandler
from gpu_worker.engines.base import Done, Event, Fault, Job, JobError, Pcm, Reference
from gpu_worker.engines.faults import BrokenDeviceError, is_broken_device, is_out_of_memory
from gpu_worker.requests import PeerSink, Request
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
from gpu_worker.scheduler import QueueFullError, Scheduler
from gpu_worker.stats import Stats
from gpu_worker.transport import Incoming, PeerGone, TransportFailed
from gpu_worker.voices import VoiceStore, VoiceWritten
from shared.catalog import ModelSpec
from shared.protocol import (
    VERSION,
    Call,
    Cancel,
    Credit,
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

log = structlog.get_logger(__name__)

Send = Callable[[bytes, Message, bytes | None], None]


class Drain(msgspec.Struct, frozen=True):
    """Finish what is speaking, refuse everything else, then end. `deadline_s` seconds later, end anyway."""

    deadline_s: float


class Wake(msgspec.Struct, frozen=True):
    """Look again without waiting: an engine may have become runnable by itself."""


class Worker:
    """One synthesis loop over all models; `run` returns when it has been told to drain and has."""

    def __init__(
        self,
        *,
        catalog: list[ModelSpec],
        send: Send,
        inbox: "queue.SimpleQueue[Any]",
        scheduler: Scheduler[Request],
        residency: Residency,
        voices: VoiceStore,
        reporter: Stats,
        max_concurrency: int,
        stall_timeout_s: float,
        clock: Callable[[], float],
        preload: Sequence[str] = (),
    ) -> None:
        self._specs = {spec.id: spec for spec in catalog}
        self._send = send
        self._inbox = inbox
        self._scheduler = scheduler
        self._residency = residency
        self._voices = voices
        self._reporter = reporter
        self._max_concurrency = max_concurrency
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._running: dict[str, Request] = {}
        self._open: dict[tuple[bytes, str], Request] = {}
        self._out_of_memory: set[str] = set()
        self._drain_until: float | None = None
        residency.preload(preload)
        self._calls = ControlHandler(
            specs=self._specs,
            residency=residency,
            voices=voices,
            submit=self._submit,
            require=self._require,
            clock=clock,
        )

    def run(self) -> None:
        """Work until drained. Raises BrokenDeviceError where only a new process can help.

        Whatever it raises, whoever waits for anything has been told before.
        """
        try:
            while not self._is_drained():
                self.turn()
            self._fail_all(_shutting_down())
        except Exception as error:
            self._tell_all(error)
            raise

    def turn(self) -> None:
        """Once around: commands, admission, one step of every engine that has work, and what came of it.

        Models are moved behind the steps and before the next commands:
        a busy model may be idle for no longer than that, and others may be waiting for it to make room.
        """
        self._take_commands()
        self._admit()
        self._step()
        self._end_stalled()
        self._move_models()
        self._calls.answer_finished()

    # --- commands --------------------------------------------------------------------------------------------------

    def _take_commands(self) -> None:
        wait_s = 0.0 if self._runnable(self._stalled()) else IDLE_TURN_S
        try:
            command = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                self._obey(command)
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _obey(self, command: object) -> None:
        match command:
            case Incoming(peer, message, payload):
                self._answer(peer, message, payload)
            case PeerGone(peer):
                self._forget_peer(peer)
            case TransitionDone() | TransitionFailed():
                self._transition_ended(command)
            case MoverFailed(reason):
                raise BrokenDeviceError(reason)
            case FilesChecked() | Downloaded() | Progress():
                self._take_report(command)
            case VoiceWritten():
                self._calls.on_voice_written(command)
            case Wake():
                pass  # it has ended the wait for a command
            case Drain(deadline_s):
                self._begin_drain(deadline_s)
            case TransportFailed(reason):
                raise RuntimeError(f"nobody can reach this process any more: {reason}")
            case _:
                raise TypeError(f"not a command: {command!r}")

    def _answer(self, peer: bytes, message: object, payload: bytes | None) -> None:
        match message:
            case Hello():
                snapshot = self._snapshot()
                catalog = list(self._specs.values())
                welcome = Welcome(
                    version=VERSION,
                    boot_id=snapshot.boot_id,
                    catalog=catalog,
                    snapshot=snapshot,
                    settings=self._reporter.settings,
                )
                self._send(peer, welcome, None)
            case Ping():
                snapshot = self._snapshot()
                self._send(peer, Pong(boot_id=snapshot.boot_id, snapshot=snapshot), None)
            case Speak():
                self._speak(peer, message, payload)
            case Credit(id=request_id, chunks=chunks):
                self._credit(peer, request_id, chunks)
            case Cancel(id=request_id):
                self._cancel(peer, request_id)
            case Call():
                self._calls.handle(peer, message, payload, lambda reply: self._send(peer, reply, None))

    def _speak(self, peer: bytes, speak: Speak, payload: bytes | None) -> None:
        sink = PeerSink(speak.id, lambda message, pcm: self._send(peer, message, pcm), speak.credit)
        request = Request(
            peer=peer,
            request_id=speak.id,
            client=speak.client,
            model=speak.model,
            sink=sink,
            keep_alive_s=speak.keep_alive_s,
            arrived=self._clock(),
            job=Job(
                id=f"{peer.hex()}-{speak.id}",
                task=speak.task,
                text=speak.text,
                voice="" if speak.saved_voice else speak.voice,
                language=speak.language,
                instructions=speak.instructions,
                sampling=speak.sampling,
                non_streaming_mode=speak.non_streaming_mode,
            ),
        )
        try:
            request.job = msgspec.structs.replace(request.job, reference=self._reference_of(speak, payload))
            self._submit(request)
        except JobError as error:
            self._reporter.count("rejected")
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

    def _submit(self, request: Request) -> None:
        """Queue a request, and start it at once where a slot is free; JobError where it cannot be taken."""
        spec = self._require(request.model)
        if (request.peer, request.id) in self._open:
            raise JobError("invalid_value", f"there is a request {request.id!r} already")
        try:
            self._scheduler.submit(request, self._slots())
        except QueueFullError as error:
            message = f"the queue is full: {error}"
            raise JobError("queue_full", message, retry_after_s=error.wait_s) from error
        self._open[request.peer, request.id] = request
        self._residency.acquire(spec.id)
        self._calls.answer_finished()  # fail the unloads that the request prevents, even if it is over in a moment
        self._admit()

    def _require(self, model: str) -> ModelSpec:
        """The model, if anybody may still ask for it; JobError where it is unknown."""
        if self._drain_until is not None:
            raise _shutting_down()
        spec = self._specs.get(model)
        if spec is None:
            known = ", ".join(self._specs)
            raise JobError("model_not_found", f"there is no model {model!r}; there are {known}", param="model")
        return spec

    def _credit(self, peer: bytes, request_id: str, chunks: int) -> None:
        request = self._open.get((peer, request_id))
        if request is None or not isinstance(request.sink, PeerSink):
            return
        request.sink.grant(chunks)
        request.stalled_since = None
        if not request.sink.stalled:
            request.playback.go_on(self._clock())
        if request.job.id not in self._running and request.admitted is not None and request.sink.drained:
            del self._open[peer, request_id]

    def _cancel(self, peer: bytes, request_id: str) -> None:
        self._calls.forget(peer, request_id)
        request = self._open.get((peer, request_id))
        if request is not None:
            self._drop(request)

    def _forget_peer(self, peer: bytes) -> None:
        self._calls.forget(peer)
        for request in [request for request in self._open.values() if request.peer == peer]:
            self._drop(request)

    # --- models ----------------------------------------------------------------------------------------------------

    def _move_models(self) -> None:
        for refusal in self._residency.advance():
            self._refuse(refusal)

    def _take_report(self, report: Report) -> None:
        refusal = self._residency.handle(report)
        if refusal is not None:
            self._refuse(refusal)

    def _transition_ended(self, report: TransitionDone | TransitionFailed) -> None:
        self._reporter.moved(report)
        self._take_report(report)
        if isinstance(report, TransitionFailed):
            return
        model = report.transition.model
        log.info(
            "transition_done",
            model=model,
            kind=report.transition.kind,
            seconds=round(report.seconds, 3),
            before_mb=round(report.before_bytes / 2**20),
            after_mb=round(report.after_bytes / 2**20),
        )
        self._calls.answer_finished()  # before the next decision takes the model elsewhere
        for request in self._scheduler:
            if request.model == model:
                request.model_ready = self._clock()

    def _refuse(self, refusal: Refusal) -> None:
        """The model cannot come to the device: whoever waits for it hears why."""
        log.warning("a model cannot be had", model=refusal.model, code=refusal.code, reason=refusal.message)
        error = JobError(refusal.code, refusal.message, param="model", retry_after_s=refusal.retry_after_s)
        for request in self._scheduler.remove(lambda request: request.model == refusal.model):
            self._end(request, error)
        self._calls.on_model_refused(refusal.model, error)

    # --- speaking --------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while (request := self._scheduler.next(self._can_start)) is not None:
            try:
                self._residency.engines[request.model].admit(request.job)
            except Exception as error:  # noqa: BLE001 -- whatever an engine does must not end the service
                self._not_admitted(request, error)
                continue
            request.admitted = self._clock()
            self._running[request.job.id] = request
            self._reporter.count("started")
            request.sink.started(request.model)

    def _not_admitted(self, request: Request, error: Exception) -> None:
        if isinstance(error, JobError):
            self._end(request, error)
            return
        message = f"{request.model} could not take the request: {error}"
        if is_out_of_memory(error):
            self._reporter.ran_out_of_memory(request.model)
            if request.tried_again:
                self._end(request, JobError("insufficient_vram", message, retry_after_s=5))
                return
            log.warning("out of device memory; evicting idle models and trying again", model=request.model)
            request.tried_again = True
            self._residency.evict_idle()
            self._scheduler.put_back(request)
            return
        log.error("an engine could not take a request", model=request.model, request_id=request.id, exc_info=error)
        self._raise_where_broken(error)
        self._end(request, JobError("synthesis_failed", message))

    def _can_start(self, model: str) -> bool:
        engine = self._residency.engines.get(model)
        if engine is None:
            return False
        if model in self._out_of_memory or self._residency.evicting:
            return False  # it would take what is being given back
        return len(self._running) < self._max_concurrency and engine.capacity() > 0

    def _step(self) -> None:
        stalled = self._stalled()
        for model in self._runnable(stalled):
            try:
                events = self._residency.engines[model].step(stalled)
            except Exception as error:  # noqa: BLE001 -- whatever an engine does must not end the service
                self._survive(model, error)
                continue
            self._out_of_memory.discard(model)
            for event in events:
                self._hand_out(event)

    def _hand_out(self, event: Event) -> None:
        request = self._running.get(event.job_id)
        if request is None:
            return
        match event:
            case Pcm(data=data):
                now = self._clock()
                if request.first_audio is None:
                    request.first_audio = now
                    self._reporter.began(request)
                request.hand_on(data, now)
            case Done(reason=reason, usage=usage):
                self._reporter.spoken(request)
                self._end(request, None)
                request.sink.finished(reason, usage, request.timings(self._clock()))
                if isinstance(request.sink, PeerSink) and not request.sink.drained:
                    self._open[request.peer, request.id] = request
            case Fault(error=error):
                self._end(request, error)

    def _survive(self, model: str, error: Exception) -> None:
        """An engine's step failed as a whole: keep the process, and as many requests as can be kept.

        Out of memory: evict idle models and try once more; then the youngest request has to go.
        While a model is on its way to the device none can be evicted, and the second try comes at once.
        A broken device (a CUDA error that sticks to the process): fail everything, and let a new process begin.
        Anything else: fail this engine's requests; those that wait for it, and all later ones, get a fresh engine.
        """
        requests = [request for request in self._running.values() if request.model == model]
        if is_out_of_memory(error) and requests:
            self._reporter.ran_out_of_memory(model)
            if model not in self._out_of_memory:
                log.warning("out of device memory; evicting idle models and trying again", model=model)
                self._out_of_memory.add(model)
                self._residency.evict_idle()
                return
            youngest = max(requests, key=lambda request: request.admitted or 0.0)
            log.warning("out of device memory; one request has to go", model=model, request_id=youngest.id)
            message = f"{model}: the device's memory is used up: {error}"
            self._end(youngest, JobError("insufficient_vram", message, retry_after_s=5))
            return
        log.error("an engine failed", model=model, exc_info=error)
        self._raise_where_broken(error)
        for request in requests:
            self._end(request, JobError("synthesis_failed", f"{model} failed while it was speaking: {error}"))
        self._residency.replace_engine(model)

    def _raise_where_broken(self, error: Exception) -> None:
        if is_broken_device(error):
            raise BrokenDeviceError(str(error)) from error

    def _tell_all(self, error: Exception) -> None:
        """Everybody hears what ends this process. Engines and models, which may be what broke, are not touched."""
        if isinstance(error, BrokenDeviceError):
            failed = JobError("synthesis_failed", f"the device of the GPU worker broke: {error}")
        else:
            failed = JobError("synthesis_failed", f"the GPU worker broke: {type(error).__name__}: {error}")
        for request in self._open.values():
            request.sink.failed(failed)
        self._calls.fail_pending(failed)

    def _fail_all(self, error: JobError) -> None:
        """Whoever has not heard everything hears that it will not be."""
        self._scheduler.remove(lambda _: True)
        for request in list(self._open.values()):
            self._fail(request, error)
        self._calls.fail_pending(error)

    def _fail(self, request: Request, error: JobError) -> None:
        """The request, no longer queued, does not get any further."""
        if request.admitted is None or request.job.id in self._running:
            self._end(request, error)
            return
        # It has been said in full, and only waited for credit.
        del self._open[request.peer, request.id]
        request.sink.failed(error)

    def _end(self, request: Request, error: JobError | None) -> None:
        """The request leaves the queue or its slot; with an error, its web worker hears of it here."""
        now = self._clock()
        if self._leave_slot(request):
            self._scheduler.finished(now - (request.admitted or now))
        self._let_go(request)
        self._open.pop((request.peer, request.id), None)
        if error is None:
            self._reporter.count("finished")
        else:
            self._reporter.count("failed")
            request.sink.failed(error)
            log.info("request failed", request_id=request.id, model=request.model, code=error.code)

    def _drop(self, request: Request) -> None:
        """Nobody listens any more: out of the queue or the slot, without a word."""
        del self._open[request.peer, request.id]
        if not self._leave_slot(request) and not self._scheduler.remove(lambda waiting: waiting is request):
            return  # it had been said in full, and only waited for credit
        self._reporter.count("cancelled")
        self._let_go(request)

    def _let_go(self, request: Request) -> None:
        """The request does not need its model any more; how long that one stays is for those to say that had a slot."""
        if request.admitted is None:
            self._residency.abandon(request.model)
        else:
            self._residency.release(request.model, request.keep_alive_s)

    def _leave_slot(self, request: Request) -> bool:
        """Free the request's slot; False where it held none."""
        if self._running.pop(request.job.id, None) is None:
            return False
        model = request.model
        self._residency.engines[model].cancel(request.job.id)
        self._residency.measured(model, self._residency.engines[model].memory())
        if all(other.model != model for other in self._running.values()):
            self._out_of_memory.discard(model)  # no step is left to try once more
        return True

    def _end_stalled(self) -> None:
        """A reader that took nothing for `stall_timeout_s` loses its request: a slot is not a parking place."""
        now = self._clock()
        for request in list(self._open.values()):
            if not request.sink.stalled or request.admitted is None:
                request.stalled_since = None
            elif request.stalled_since is None:
                request.stalled_since = now
            elif now - request.stalled_since > self._stall_timeout_s:
                self._fail(request, JobError("client_too_slow", f"nothing was read for {self._stall_timeout_s:.0f} s"))

    # --- the process -----------------------------------------------------------------------------------------------

    def _stalled(self) -> set[str]:
        """The jobs whose reader has to catch up first."""
        return {job_id for job_id, request in self._running.items() if request.sink.stalled}

    def _runnable(self, stalled: set[str]) -> list[str]:
        """The models whose engine would do work now; one that ran out of memory waits until there is room."""
        waiting = self._out_of_memory if self._residency.evicting else ()
        return [
            model
            for model, engine in self._residency.engines.items()
            if model not in waiting and engine.runnable(stalled)
        ]

    def _slots(self) -> int:
        """How many requests can hold a slot at once, as far as the engines that are open tell."""
        room = sum(engine.capacity() for engine in self._residency.engines.values()) + len(self._running)
        return min(self._max_concurrency, room) if self._residency.engines else self._max_concurrency

    def _snapshot(self) -> Snapshot:
        return self._reporter.snapshot(
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
        for request in self._scheduler.remove(lambda _: True):
            self._end(request, _shutting_down())

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        if self._clock() > self._drain_until:
            return True
        return not self._open and not self._voices.writing


def _shutting_down() -> JobError:
    return JobError("shutting_down", "the GPU worker is shutting down", retry_after_s=5)
