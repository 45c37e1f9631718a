"""The synthesis loop: commands, admission, open text, steps, stalled readers, out of memory, drain.

Every turn handles commands, gives slots to requests, steps every runnable engine, delivers the events,
and starts transitions.
Worker owns all requests, on one thread; queues are all it shares with the other threads.
It owns no socket (see `transport`), writes no voice (see `voices`), and decides neither which request is next
(see `scheduler`), nor which one gives its slot to another (see `slots`), nor which model is where (see `residency`).
It reports each request to the limits and the usage of its key (see `limits`, `usage`), and counts neither itself.
"""

import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, assert_never

import msgspec
import structlog

from gpu_worker.caches import Caches
from gpu_worker.control import ControlHandler
from gpu_worker.engines.base import Done, Event, Fault, Job, JobError, Pcm, Reference
from gpu_worker.engines.faults import BrokenDeviceError, is_broken_device, is_out_of_memory
from gpu_worker.keys import LimitCounter, Sums, UsageFound, UsageLog
from gpu_worker.requests import (
    MAX_OUTCOMES,
    AudioBuffer,
    Cancelled,
    Ending,
    Outcome,
    Outcomes,
    Request,
    RequestState,
    Sink,
    speech_error,
)
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
from gpu_worker.scheduling import NEWCOMERS_IN_A_ROW, Place, Scheduler, Slots
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
    FindSpeech,
    FromWeb,
    Hello,
    Message,
    Ping,
    Pong,
    Snapshot,
    Speak,
    SpeechError,
    SpeechOutcome,
    Spoken,
    UsedElsewhere,
    Welcome,
    is_known_as,
)

IDLE_TURN_S: Final = 0.05
"""How long an idle loop waits for a command before it looks at the clock again."""

UNKNOWN_SLOTS: Final = 8
"""The slots of a model that has not been resident yet: a model has as many on a CPU, and seldom fewer on a GPU."""

OPEN_CHECK_S: Final = 0.1
"""Seconds between two looks at all open requests: there may be thousands."""

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
        stall_timeout_s: float,
        open_text_timeout_s: float,
        max_input_chars: int,
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
        self.stall_timeout_s = stall_timeout_s
        self.open_text_timeout_s = open_text_timeout_s
        self.max_input_chars = max_input_chars
        self._clock = clock
        self._limits = limits
        self._usage = usage
        self._on_turn = on_turn
        self._on_request_over = on_request_over
        self._open: dict[tuple[bytes, str], Request] = {}  # by peer and request id; all that are not DONE
        self._outcomes = Outcomes()
        self._caches = Caches(lambda: residency.engines, voices)
        self._open_sockets: dict[bytes, int] = {}
        """WebSockets of each web worker, by its last Ping."""
        self._slots = Slots(lambda: residency.engines, buffer, max_concurrency=max_concurrency, clock=clock)
        self._newcomers_in_a_row = 0
        self._held_back: set[str] = set()  # the jobs that the last step left out
        self._open_checked_at = clock()
        self._out_of_memory: set[str] = set()  # models whose next step is the second try
        self._slots_of: dict[str, int] = {}  # by model, as many as it had when it became resident
        self._drain_until: float | None = None
        residency.preload(preload)
        self._control = ControlHandler(
            specs=self._specs,
            residency=residency,
            voices=voices,
            consents=consents,
            voices_folder=voices_folder,
            buffer=buffer,
            submit=self._submit,
            check_model=self._check_model,
            find_speech=self._find_speech,
            find_usage=usage.find,
            empty_cache=self._caches.empty,
            take_settings=take_settings,
            settings=lambda: stats.settings,
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
        self._give_slots()
        self._step_engines()
        self._check_open()
        for refusal in self._residency.advance():
            self._refuse(refusal)
        self._control.answer_finished()
        self._voices_folder.scan_if_due()
        self._usage.flush_if_due()

    # --- commands --------------------------------------------------------------------------------------------------

    def _handle_commands(self) -> None:
        wait_s = 0.0 if self._runnable(self._left_out()) else IDLE_TURN_S
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
            case Ping(caches=counts, open_sockets=sockets):
                self._caches.record(peer, counts)
                self._open_sockets[peer] = sockets
                snapshot = self._snapshot()
                self._send(peer, Pong(boot_id=snapshot.boot_id, snapshot=snapshot), None)
            case Speak():
                self._speak(peer, message, payload)
            case Append() | EndText():
                self._take_text(peer, message)
            case Credit(id=request_id, chunks=chunks):
                self._grant_credit(peer, request_id, chunks)
            case Cancel(id=request_id, error=error):
                self._cancel(peer, request_id, error)
            case UsedElsewhere(source=source, clients=clients):
                self._limits.take(source, clients)
            case Spoken(outcome=outcome):
                self._outcomes.record(outcome)
            case Call():
                self._control.handle(peer, message, payload, lambda reply: self._send(peer, reply, None))
            case _:
                assert_never(message)

    def _speak(self, peer: bytes, speak: Speak, payload: bytes | None) -> None:
        sink = Sink(speak.id, lambda message, pcm: self._send(peer, message, pcm), speak.credit, self._slots.buffer)
        try:
            reference = self._reference_of(speak, payload)
            self._submit(
                Request(
                    peer=peer,
                    id=speak.id,
                    client=speak.client,
                    model=speak.model,
                    voice=speak.voice,
                    is_batch=speak.priority == "batch",
                    deadline_s=speak.deadline_s,
                    limits=speak.limits,
                    traceparent=speak.traceparent,
                    sink=sink,
                    keep_alive_s=speak.keep_alive_s,
                    arrived_at=self._clock(),
                    job=Job(
                        id=f"{peer.hex()}-{speak.id}",
                        task=speak.task,
                        segments=speak.segments,
                        voice="" if speak.saved_voice else speak.voice,
                        language=speak.language,
                        instructions=speak.instructions,
                        reference=reference,
                        sampling=speak.sampling,
                        non_streaming_mode=speak.non_streaming_mode,
                        timestamps=speak.timestamps,
                        open=speak.open,
                    ),
                )
            )
        except JobError as error:
            self._stats.request_rejected()
            self._usage.add(speak.client, speak.model, Sums(refused=1))
            sink.failed(error)
            self._outcomes.record(
                SpeechOutcome(
                    id=speak.id,
                    client=speak.client,
                    status="failed",
                    model=speak.model,
                    voice=speak.voice,
                    error=speech_error(error),
                )
            )

    def _reference_of(self, speak: Speak, payload: bytes | None) -> Reference | None:
        if speak.saved_voice:
            saved = self._voices.load(speak.voice, speak.access)
            if not speak.x_vector_only or saved.x_vector_only:
                return saved
            return msgspec.structs.replace(saved, key=f"{saved.key}/x-vector", x_vector_only=True)
        if payload is None:
            return None
        return Reference.of(payload, text=speak.reference_text, x_vector_only=speak.x_vector_only)

    def _take_text(self, peer: bytes, message: Append | EndText) -> None:
        request = self._open.get((peer, message.id))
        if request is None or not request.text_open:
            return
        try:
            if isinstance(message, Append):
                self._count_text(request, len(message.text))
        except JobError as error:
            self._stats.limit_hit(error.limit)
            self._finish(request, error)
            return
        request.take_text(message, self._clock())
        if request.state in {RequestState.RUNNING, RequestState.PARKED}:
            self._write_text(request, message)

    def _count_text(self, request: Request, characters: int) -> None:
        if request.text_chars + characters > self.max_input_chars:
            problem = f"must have at most {self.max_input_chars} characters in all its parts"
            raise JobError("invalid_value", problem, param="input")
        self._limits.add_characters(request.client, request.limits, characters)

    def _write_text(self, request: Request, message: Append | EndText) -> None:
        engine = self._residency.engines[request.model]
        if isinstance(message, EndText):
            engine.end_text(request.job.id)
        else:
            engine.append(request.job.id, message.text, flush=message.flush)

    def _grant_credit(self, peer: bytes, request_id: str, chunks: int) -> None:
        request = self._open.get((peer, request_id))
        if request is not None:
            request.grant(chunks, self._clock())
            self._forget_if_done(request, "finished")

    def _cancel(self, peer: bytes, request_id: str, error: SpeechError | None) -> None:
        self._control.forget(peer, request_id)
        request = self._open.get((peer, request_id))
        if request is not None:
            self._finish(request, Cancelled(error))
        else:
            self._outcomes.amend(request_id, error)

    def _forget_peer(self, peer: bytes) -> None:
        self._control.forget(peer)
        self._caches.forget(peer)
        self._open_sockets.pop(peer, None)
        gone = SpeechError(code="internal_error", message="the web worker that answered the request is gone")
        for request in [request for request in self._open.values() if request.peer == peer]:
            self._finish(request, Cancelled(gone))

    def _find_speech(self, wanted: FindSpeech) -> SpeechOutcome:
        for request in reversed(self._open.values()):
            if is_known_as(request.id, wanted.id) and wanted.client in ("", request.client):
                position = self._scheduler.position(request)
                return msgspec.structs.replace(request.to_outcome(), queue_position=position)
        outcome = self._outcomes.find(wanted.id, wanted.client)
        if outcome is None:
            raise JobError("not_found", f"none of the last {MAX_OUTCOMES} requests has this id")
        return outcome

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
            self._warm_up(model)
        self._control.answer_finished()  # before the next transition takes the model elsewhere
        for request in self._scheduler:
            if request.model == model:
                request.model_ready_at = self._clock()

    def _warm_up(self, model: str) -> None:
        try:
            self._residency.engines[model].warm_up()
        except Exception as error:
            _raise_if_broken(error)
            log.warning("warm_up_failed", model=model, exc_info=error)  # the first job tries again

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
        characters = sum(len(segment.text) for segment in request.job.segments)
        can_start = self._can_start(request.model, request.yields(self._clock()))
        free_slots = self._slots.free(request.model, unknown=self._slots_of.get(request.model, UNKNOWN_SLOTS))
        try:
            self._limits.check(request.client, request.limits, characters)
            self._scheduler.submit(request, len(self._slots), free_slots=free_slots, can_start=can_start)
        except JobError as error:
            error.rate_limit = self._limits.left(request.client, request.limits)
            self._stats.limit_hit(error.limit)
            raise
        request.rate_limit = self._limits.count(request.client, request.limits, characters)
        self._open[request.peer, request.id] = request
        self._residency.acquire(request.model)
        self._control.answer_finished()  # fail the unloads that the request prevents, even if it is over in a moment
        self._give_slots()

    def _give_slots(self) -> None:
        """Give a slot to every request that can have one.

        After NEWCOMERS_IN_A_ROW newcomers comes a parked request that runs dry.
        The rest of the free slots go to other parked requests.
        """
        self._slots.out_of_room = False
        while self._start_or_unpark() or self._unpark_next(hungry=False):
            pass

    def _start_or_unpark(self) -> bool:
        """Give one slot to a newcomer or to a hungry parked request; False if neither can have one."""
        newcomers_first = self._newcomers_in_a_row < NEWCOMERS_IN_A_ROW
        if newcomers_first and self._start_next():
            self._newcomers_in_a_row += 1
            return True
        if self._unpark_next(hungry=True, its_turn=not newcomers_first):
            self._newcomers_in_a_row = 0
            return True
        return not newcomers_first and self._start_next()

    def _start_next(self) -> bool:
        request = self._scheduler.next(self._can_start)
        if request is None:
            return False
        # Asked again, because time has passed: a request that was ahead enough to be parked may not be any more.
        place = self._slots.place_for_newcomer(request.model, yields=request.yields(self._clock()))
        if place is None or not self._vacate(place):
            self._scheduler.put_back(request)
            return False
        try:
            self._residency.engines[request.model].admit(request.job)
        except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
            self._admission_failed(request, error)
        else:
            self._slots.running[request.job.id] = request
            self._stats.request_started(request)
            request.start(self._clock())
            for message in request.held_text:
                self._write_text(request, message)
            request.held_text.clear()
        return True

    def _unpark_next(self, *, hungry: bool, its_turn: bool = False) -> bool:
        """Put the parked request with the least audio in hand into a slot; with `hungry`, only if it runs dry.

        `its_turn`: newcomers went before it.
        """
        models = [model for model in self._residency.engines if self._takes_jobs(model)]
        if not hungry:
            models = [model for model in models if self._slots.has_spare(model)]
        request = self._slots.next_parked(models)
        if request is None or (hungry and not self._slots.is_hungry(request)):
            return False
        place = self._slots.place_for_parked(request, its_turn=its_turn)
        if place is None or not self._vacate(place):
            return False
        try:
            self._residency.engines[request.model].unpark(request.job.id)
        except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
            self._recover(request.model, error)
            return False
        del self._slots.parked[request.job.id]
        self._slots.running[request.job.id] = request
        request.unpark(self._clock())
        return True

    def _vacate(self, place: Place) -> bool:
        """Park the request that holds `place`, if there is one; False if it could not be parked."""
        request = place.parks
        if request is None:
            return True
        try:
            parked_bytes = self._residency.engines[request.model].park(request.job.id)
        except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
            if is_out_of_memory(error):
                log.warning("no_host_ram_to_park", model=request.model, request_id=request.id)
                self._slots.stop_parking()
            else:
                self._recover(request.model, error)
            return False
        del self._slots.running[request.job.id]
        self._slots.parked[request.job.id] = request
        request.park(parked_bytes, self._clock())
        return True

    def _takes_jobs(self, model: str) -> bool:
        """Whether the model's engine may take a job into a slot, if there is one.

        While memory is being freed for a step, a job would take that memory.
        """
        return model in self._residency.engines and model not in self._out_of_memory and not self._residency.evicting

    def _can_start(self, model: str, yields: bool) -> bool:  # noqa: FBT001 -- as the scheduler asks
        return self._takes_jobs(model) and self._slots.place_for_newcomer(model, yields=yields) is not None

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

        A request in the queue, in a slot or parked leaves it, and drops its reference on the model.
        Speech that is complete but not sent stays open as DRAINING; a second outcome may end that early.
        """
        if request.state in {RequestState.QUEUED, RequestState.RUNNING, RequestState.PARKED}:
            self._release(request, outcome)
        request.end(outcome, self._clock())
        match outcome:
            case Done():
                self._stats.speech_made(request)
                self._forget_if_done(request, "finished")
            case JobError():
                log.info("request_failed", request_id=request.id, model=request.model, code=outcome.code)
                self._forget_if_done(request, "failed")
            case Cancelled():
                self._forget_if_done(request, "cancelled")
            case _:
                assert_never(outcome)

    def _forget_if_done(self, request: Request, ending: Ending) -> None:
        """Count a request whose last message is sent, and forget it; each request once."""
        if request.state is RequestState.DONE:
            del self._open[request.peer, request.id]
            self._limits.end(request.client, request.limits)
            self._usage.add(request.client, request.model, _use_of(request, ending))
            self._outcomes.record(request.to_outcome())
            self._stats.request_ended(ending)
            self._on_request_over(request, ending)

    def _release(self, request: Request, outcome: Outcome) -> None:
        """Take `request` out of the queue, its slot or where it is parked, and drop its reference on the model.

        Only a request that held a slot decides how long the model stays.
        """
        if request.state is RequestState.QUEUED:
            self._scheduler.remove(request)
            self._residency.abandon(request.model)
            return
        self._scheduler.settle(request, request.audio_s)
        if not isinstance(outcome, Cancelled):
            self._scheduler.record_slot_time(request.synthesis_s(self._clock()))
        model = request.model
        self._slots.remove(request)
        engine = self._residency.engines[model]
        engine.cancel(request.job.id)
        self._residency.measured(model, engine.memory())
        if all(other.model != model for other in self._slots.running.values()):
            self._out_of_memory.discard(model)  # there is no step left to retry
        self._residency.release(model, request.keep_alive_s)

    def _check_open(self) -> None:
        """Fail the requests that are late, whose text does not come, or whose reader took nothing.

        If a request could start but for the full buffer, the one that has been stalled for the longest time fails.
        """
        now = self._clock()
        if now - self._open_checked_at < OPEN_CHECK_S:
            return
        self._open_checked_at = now
        self._check_texts(now)
        for request in [request for request in self._open.values() if request.is_late(now)]:
            reason = f"no audio could be made within {request.deadline_s:g} s"
            self._finish(request, JobError("deadline_exceeded", reason))
        for request in [request for request in self._open.values() if request.unread_s(now) > self.stall_timeout_s]:
            self._fail_slow(request, f"nothing was read for {self.stall_timeout_s:.0f} s")
        if self._slots.out_of_room:
            stalled = self._slots.longest_stalled(self._open.values())
            if stalled is not None:
                reason = f"nothing was read for {stalled.unread_s(now):.0f} s, and the buffer is full"
                self._fail_slow(stalled, reason)

    def _check_texts(self, now: float) -> None:
        """Fail the open requests that have waited for text for `open_text_timeout_s`."""
        for request in list(self._slots):
            if not request.text_open:
                continue
            if not self._slots.waits_for_text(request):
                request.waits_since = None
            elif request.waits_since is None:
                request.waits_since = now
            elif now - request.waits_since > self.open_text_timeout_s:
                reason = f"the rest of the text did not come: nothing for {self.open_text_timeout_s:.0f} s"
                self._finish(request, JobError("request_timeout", reason))

    def _fail_slow(self, request: Request, reason: str) -> None:
        self._finish(request, JobError("client_too_slow", reason))

    # --- synthesis -------------------------------------------------------------------------------------------------

    def _step_engines(self) -> None:
        held_back = self._hold_back()
        for model in self._runnable(held_back):
            try:
                events = self._residency.engines[model].step(held_back)
            except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
                self._recover(model, error)
                continue
            self._out_of_memory.discard(model)
            for event in events:
                self._deliver(event)

    def _deliver(self, event: Event) -> None:
        request = self._slots.get(event.job_id)
        if request is None:
            return  # cancelled since
        match event:
            case Pcm(data=data, rate=rate, words=words):
                if request.first_audio_at is None:
                    self._stats.first_audio(request)
                self._stats.audio_made(request.model, len(data))
                request.push(data, self._clock(), rate, words)
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
        Anything else: fail the requests that this engine has; queued and later requests get a new engine.
        """
        running = _of_model(model, self._slots.running.values())
        if is_out_of_memory(error) and running:
            self._stats.out_of_memory(model)
            if model not in self._out_of_memory:
                log.warning("out_of_memory_evicting_idle_models", model=model)
                self._out_of_memory.add(model)
                self._residency.evict_idle()
                return
            youngest = max(running, key=lambda request: request.started_at or 0.0)
            log.warning("out_of_memory_failing_youngest_request", model=model, request_id=youngest.id)
            message = f"{model}: the device's memory is used up: {error}"
            self._finish(youngest, JobError("insufficient_vram", message, retry_after_s=5))
            return
        log.error("engine_failed", model=model, exc_info=error)
        _raise_if_broken(error)
        for request in _of_model(model, self._slots):
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

    def _hold_back(self) -> set[str]:
        """The jobs that the next step leaves out, now that it begins."""
        now, held_back = self._clock(), self._left_out()
        for job_id in held_back ^ self._held_back:
            request = self._slots.running.get(job_id)
            if request is not None:
                request.set_idle(idle=job_id in held_back, now=now)
        self._held_back = held_back
        return held_back

    def _left_out(self) -> set[str]:
        """The jobs that a step leaves out if it is the next one."""
        return self._slots.held_back(self._held_back, self._stepped_models())

    def _runnable(self, held_back: set[str]) -> list[str]:
        """The models whose engine has work."""
        engines = self._residency.engines
        return [model for model in self._stepped_models() if engines[model].runnable(held_back)]

    def _stepped_models(self) -> list[str]:
        """The resident models; one that ran out of memory waits while idle models are evicted."""
        waiting = self._out_of_memory if self._residency.evicting else ()
        return [model for model in self._residency.engines if model not in waiting]

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
            requests=self._open.values(),
            preloading=self._residency.preloading,
            caches=self._caches,
            open_sockets=sum(self._open_sockets.values()),
            key_use=self._limits.worker_use,
        )

    def _begin_drain(self, deadline_s: float) -> None:
        if self._drain_until is not None:
            return
        log.info("draining", running=len(self._slots.running), queued=len(self._scheduler))
        self._drain_until = self._clock() + deadline_s
        for request in list(self._scheduler):
            self._finish(request, _shutting_down())
        for request in list(self._slots):
            if request.text_open:  # what has come of its text is said to the end
                request.text_cut = _shutting_down()
                self._take_text(request.peer, EndText(id=request.id))

    def _is_drained(self) -> bool:
        if self._drain_until is None:
            return False
        if self._clock() > self._drain_until:
            return True
        return not self._open and not self._voices.writing and not self._consents.writing


def _of_model(model: str, requests: Iterable[Request]) -> list[Request]:
    return [request for request in requests if request.model == model]


def _use_of(request: Request, ending: Ending) -> Sums:
    return Sums(
        requests=1,
        characters=request.text_chars,
        audio_s=request.audio_s,
        failed=ending == "failed",
        cancelled=ending == "cancelled",
    )


def _raise_if_broken(error: Exception) -> None:
    if is_broken_device(error):
        raise BrokenDeviceError(str(error)) from error


def _shutting_down() -> JobError:
    return JobError("shutting_down", "the GPU worker is shutting down", retry_after_s=5)
