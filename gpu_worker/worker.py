"""The synthesis loop: every turn handles commands, gives slots, steps the engines and starts transitions.

Worker receives everything that reaches the loop and passes it on: requests to `lifecycle`, calls to `control`,
reports to the package that asked for them. It owns the start and the end of the loop, and answers Hello and Ping.
All of it runs on one thread; queues are all it shares with the other threads. It owns no socket (see `transport`).
"""

import queue
from collections.abc import Callable, Mapping, Sequence
from typing import Final, assert_never

import msgspec
import structlog

from gpu_worker.caches import Caches
from gpu_worker.control import ControlHandler
from gpu_worker.engines.base import JobError, Reference
from gpu_worker.engines.faults import BrokenDeviceError, raise_if_broken
from gpu_worker.keys import LimitCounter, UsageFound, UsageLog
from gpu_worker.lifecycle import Admission, EngineSteps, OpenRequests, OpenText, RequestBounds, Timeouts
from gpu_worker.requests import AudioBuffer, Cancelled, Ending, Request, Sink
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
from gpu_worker.scheduling import Scheduler, Slots
from gpu_worker.stats import Stats
from gpu_worker.transport import Incoming, PeerGone, TransportEvent, TransportFailed
from gpu_worker.voices import ConsentStore, FolderScanned, FolderWatch, VoiceStore, VoiceWritten
from shared.catalog import ModelSpec
from shared.protocol import (
    VERSION,
    Append,
    Call,
    Cancel,
    Credit,
    EndText,
    FromWeb,
    Hello,
    Message,
    Ping,
    Pong,
    Snapshot,
    Speak,
    SpeechError,
    Spoken,
    UsedElsewhere,
    Welcome,
)

IDLE_TURN_S: Final = 0.05
"""How long an idle loop waits for a command before it looks at the clock again."""

MAX_COMMANDS_S: Final = 0.1
"""A turn that has handled commands for so long leaves the rest to the next: a flood must not silence the engines."""

log = structlog.get_logger(__name__)

Send = Callable[[bytes, Message, bytes | None], None]


class Drain(msgspec.Struct, frozen=True):
    """Finish the running requests, refuse all others, then end; `deadline_s` seconds later, end anyway."""

    deadline_s: float


class Wake(msgspec.Struct, frozen=True):
    """End the wait for a command: an engine may have become runnable."""


Command = TransportEvent | Report | MoverFailed | VoiceWritten | FolderScanned | UsageFound | Drain | Wake
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
        consents: ConsentStore,
        voices_folder: FolderWatch,
        stats: Stats,
        buffer: AudioBuffer,
        max_concurrency: int,
        bounds: RequestBounds,
        limits: LimitCounter,
        usage: UsageLog,
        clock: Callable[[], float],
        take_settings: Callable[[Mapping[str, str]], None] = lambda _variables: None,
        preload: Sequence[str] = (),
        on_turn: Callable[[], None] = lambda: None,
        on_request_over: Callable[[Request, Ending], None] = lambda _request, _ending: None,
    ) -> None:
        self._specs = {spec.id: spec for spec in catalog}
        self._send = send
        self._inbox = inbox
        self._scheduler = scheduler
        self._residency = residency
        self._voices = voices
        self._consents = consents
        self._voices_folder = voices_folder
        self._stats = stats
        self._limits = limits
        self._usage = usage
        self._clock = clock
        self._on_turn = on_turn
        self._drain_until: float | None = None
        self._caches = Caches(lambda: residency.engines, voices)
        self._open_sockets: dict[bytes, int] = {}
        """WebSockets of each web worker, by its last Ping."""
        self._slots = slots = Slots(lambda: residency.engines, buffer, max_concurrency=max_concurrency, clock=clock)
        self._requests = requests = OpenRequests(
            scheduler=scheduler,
            slots=slots,
            residency=residency,
            limits=limits,
            usage=usage,
            stats=stats,
            clock=clock,
            on_request_over=on_request_over,
        )
        self._steps = EngineSteps(requests, slots=slots, residency=residency, stats=stats, clock=clock)
        self._open_text = OpenText(
            requests, slots=slots, residency=residency, limits=limits, stats=stats, bounds=bounds, clock=clock
        )
        self._timeouts = Timeouts(requests, self._open_text, slots=slots, bounds=bounds, clock=clock)
        self._admission = Admission(
            requests,
            scheduler=scheduler,
            slots=slots,
            residency=residency,
            steps=self._steps,
            open_text=self._open_text,
            limits=limits,
            stats=stats,
            clock=clock,
        )
        self._control = ControlHandler(
            specs=self._specs,
            residency=residency,
            voices=voices,
            consents=consents,
            voices_folder=voices_folder,
            buffer=buffer,
            submit=self._submit,
            check_model=self._check_model,
            find_speech=requests.find,
            find_usage=usage.find,
            empty_cache=self._caches.empty,
            take_settings=take_settings,
            settings=lambda: stats.settings,
            clock=clock,
        )
        residency.preload(preload)

    def use(self, bounds: RequestBounds) -> None:
        """Let these bounds hold, also for the requests that are open."""
        self._timeouts.bounds = self._open_text.bounds = bounds

    def run(self) -> None:
        """Work until drained. Raises BrokenDeviceError if only a new process can help.

        Whatever it raises, it has failed all requests and calls before.
        """
        try:
            while not self._is_drained():
                self._on_turn()
                self.turn()
            for request in self._requests:
                self._requests.finish(request, _shutting_down())
            self._usage.flush()
            self._control.fail_pending(_shutting_down())
        except Exception as error:
            self._fail_everything(error)
            raise

    def turn(self) -> None:
        """One round: commands, slots, one step of every runnable engine, transitions.

        Transitions start between the steps and the next commands: a busy model may be idle for just that moment,
        and others may be waiting for its room.
        """
        self._handle_commands()
        self._admission.give_slots()
        self._steps.step()
        self._timeouts.check_if_due()
        for refusal in self._residency.advance():
            self._refuse(refusal)
        self._control.answer_finished()
        self._voices_folder.scan_if_due()
        self._usage.flush_if_due()

    # --- commands --------------------------------------------------------------------------------------------------

    def _handle_commands(self) -> None:
        wait_s = 0.0 if self._steps.have_work() else IDLE_TURN_S
        try:
            command = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            until = self._clock() + MAX_COMMANDS_S
            while True:
                self._dispatch(command)
                if self._clock() >= until:
                    return
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
            case VoiceWritten() | FolderScanned():
                self._control.on_voices_report(command)
            case UsageFound():
                self._control.on_usage_found(command)
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
            case Ping(caches=counts, open_sockets=sockets, limit_hits=hits):
                self._caches.record(peer, counts)
                self._stats.add_limit_hits(hits)
                self._open_sockets[peer] = sockets
                snapshot = self._snapshot()
                self._send(peer, Pong(boot_id=snapshot.boot_id, snapshot=snapshot), None)
            case Speak():
                self._speak(peer, message, payload)
            case Append() | EndText():
                self._open_text.take(peer, message)
            case Credit(id=request_id, chunks=chunks):
                self._requests.grant_credit(peer, request_id, chunks)
            case Cancel(id=request_id, error=error):
                self._cancel(peer, request_id, error)
            case UsedElsewhere(source=source, clients=clients):
                self._limits.take(source, clients)
            case Spoken(outcome=outcome):
                self._requests.outcomes.record(outcome)
            case Call():
                self._control.handle(peer, message, payload, lambda reply: self._send(peer, reply, None))
            case _:
                assert_never(message)

    def _speak(self, peer: bytes, speak: Speak, payload: bytes | None) -> None:
        sink = Sink(speak.id, lambda message, pcm: self._send(peer, message, pcm), speak.credit, self._slots.buffer)
        try:
            reference = self._reference_of(speak, payload)
            self._submit(Request.of(speak, peer=peer, sink=sink, reference=reference, arrived_at=self._clock()))
        except JobError as error:
            sink.failed(error)
            self._requests.reject(speak, error)

    def _reference_of(self, speak: Speak, payload: bytes | None) -> Reference | None:
        if speak.saved_voice:
            saved = self._voices.load(speak.voice, speak.access)
            if not speak.x_vector_only or saved.x_vector_only:
                return saved
            return msgspec.structs.replace(saved, key=f"{saved.key}/x-vector", x_vector_only=True)
        if payload is None:
            return None
        return Reference.of(payload, text=speak.reference_text, x_vector_only=speak.x_vector_only)

    def _cancel(self, peer: bytes, request_id: str, error: SpeechError | None) -> None:
        self._control.forget(peer, request_id)
        request = self._requests.get(peer, request_id)
        if request is not None:
            self._requests.finish(request, Cancelled(error))
        else:
            self._requests.outcomes.amend(request_id, error)

    def _forget_peer(self, peer: bytes) -> None:
        self._control.forget(peer)
        self._caches.forget(peer)
        self._open_sockets.pop(peer, None)
        gone = SpeechError(code="internal_error", message="the web worker that answered the request is gone")
        for request in self._requests:
            if request.peer == peer:
                self._requests.finish(request, Cancelled(gone))

    def _submit(self, request: Request) -> None:
        """Queue a request, and start it at once if a slot is free; JobError if it cannot be queued."""
        self._check_model(request.model)
        self._admission.queue(request)
        self._control.answer_finished()  # fail the unloads that the request prevents, even if it is over in a moment
        self._admission.give_slots()

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
            self._warm_up(model)
            self._admission.on_model_ready(model)
        self._control.answer_finished()  # before the next transition takes the model elsewhere

    def _warm_up(self, model: str) -> None:
        try:
            self._residency.engines[model].warm_up()
        except Exception as error:
            raise_if_broken(error)
            log.warning("warm_up_failed", model=model, exc_info=error)  # the first job tries again

    def _refuse(self, refusal: Refusal) -> None:
        """The model cannot become resident: fail the requests and calls that wait for it."""
        log.warning("model_load_refused", model=refusal.model, code=refusal.code, reason=refusal.message)
        error = JobError(refusal.code, refusal.message, param="model", retry_after_s=refusal.retry_after_s)
        for request in [request for request in self._scheduler if request.model == refusal.model]:
            self._requests.finish(request, error)
        self._control.on_model_refused(refusal.model, error)

    # --- the process -----------------------------------------------------------------------------------------------

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
        for model, engine in self._residency.engines.items():
            self._stats.engine_stats(model, engine.stats())
        return self._stats.snapshot(
            accepting=self._drain_until is None,
            running=len(self._slots.running),
            queued=len(self._scheduler),
            slots=len(self._slots),
            buffer=self._slots.buffer,
            models=self._residency.statuses(),
            offloaded_bytes=self._residency.offloaded_bytes(),
            cleanup=self._residency.last_cleanup,
            voices=self._voices.list(),
            requests=self._requests,
            preloading=self._residency.preloading,
            caches=self._caches,
            open_sockets=sum(self._open_sockets.values()),
            key_use=self._limits.worker_use,
        )

    def _begin_drain(self, deadline_s: float) -> None:
        until = self._clock() + deadline_s
        if self._drain_until is not None:
            self._drain_until = min(self._drain_until, until)
            return
        log.info("draining", running=len(self._slots.running), queued=len(self._scheduler))
        self._drain_until = until
        for request in list(self._scheduler):
            self._requests.finish(request, _shutting_down())
        self._open_text.cut_all(_shutting_down())

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        if self._clock() > self._drain_until:
            return True
        return not self._requests and not self._voices.writing and not self._consents.writing

    def _fail_everything(self, error: Exception) -> None:
        """Fail every request and call before the process ends. Engines and models may be broken: do not touch them."""
        if isinstance(error, BrokenDeviceError):
            failed = JobError("synthesis_failed", f"the device of the GPU worker broke: {error}")
        else:
            failed = JobError("synthesis_failed", f"the GPU worker broke: {type(error).__name__}: {error}")
        for request in self._requests:
            request.sink.failed(failed)
        self._control.fail_pending(failed)


def _shutting_down() -> JobError:
    return JobError("shutting_down", "the GPU worker is shutting down", retry_after_s=5)
