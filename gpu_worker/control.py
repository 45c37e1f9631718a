"""Calls of the web workers (models, voices, consents, outcomes of requests, caches), and those not answered yet.

Owned by the synthesis thread. ControlHandler moves no model, synthesizes nothing and writes no file:
it asks Residency, submits Requests, and hands voices to VoiceStore and consents to ConsentStore.
"""

import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, assert_never

import msgspec

from gpu_worker.engines.base import Job, JobError
from gpu_worker.keys import UsageFound
from gpu_worker.requests import AudioBuffer, Request, Sink, failed_message
from gpu_worker.residency import ModelBusyError, Residency
from gpu_worker.voices import (
    ConsentRecord,
    ConsentStore,
    FolderScanned,
    FolderWatch,
    OutdatedError,
    VoiceStore,
    VoiceWrite,
    VoiceWritten,
    check_recording,
    check_transcript,
)
from shared.catalog import ModelSpec
from shared.protocol import (
    Audio,
    CacheName,
    Call,
    Cleanup,
    CloneVoice,
    ConsentAction,
    CreateConsent,
    DeleteConsent,
    DeleteVoice,
    DesignVoice,
    EmptyCache,
    ExportVoice,
    Failed,
    FindConsent,
    FindSpeech,
    FindUsage,
    FindVoice,
    Finished,
    ImportVoice,
    ListConsents,
    LoadModel,
    Message,
    PinModel,
    PortableVoice,
    Reload,
    RenameConsent,
    Reply,
    Sampling,
    SavedVoice,
    Segment,
    SpeechOutcome,
    UnloadModel,
    UpdateVoice,
    VoiceAction,
    VoiceConsent,
)

DESIGN_TEXT: Final = (
    "This is how I sound when I speak at my ease. I take my time, I breathe between the words, "
    "and I try to let every sentence come out clear and natural."
)
"""The text that a designed voice speaks once; the recording of it is then cloned like any other."""

DESIGN_MAX_FRAMES: Final = 375
"""30 s, three times what the text takes: a model that does not stop makes no voice of half an hour."""

_UNLIMITED: Final = 2**62
"""Credit of the sink that collects a designed voice: it must never stall."""

Answer = Callable[[Message], None]


class _Caller(msgspec.Struct, frozen=True):
    """The web worker that made a call; `answer` sends its only answer."""

    peer: bytes
    call_id: str
    answer: Answer

    def fail(self, error: JobError) -> None:
        self.answer(failed_message(self.call_id, error))


class _PendingLoad(msgspec.Struct, frozen=True):
    """Done when `model` is resident."""

    caller: _Caller
    model: str


class _PendingUnload(msgspec.Struct, frozen=True):
    """Done when `model` is absent."""

    caller: _Caller
    model: str


class _PendingCleanup(msgspec.Struct, frozen=True):
    """Done when the cleanup pass has ended."""

    caller: _Caller


class _PendingWrite(msgspec.Struct, frozen=True):
    """Done when the report of `write` is there."""

    caller: _Caller
    write: VoiceWrite


class _PendingUsage(msgspec.Struct, frozen=True):
    """Done when the rows of `find` are there."""

    caller: _Caller
    find: FindUsage


class _PendingScan(msgspec.Struct, frozen=True):
    """A call that failed by an outdated list; carried out again after scan `number` of the voices' folder."""

    caller: _Caller
    number: int
    call: Call
    payload: bytes | None


_Pending = _PendingLoad | _PendingUnload | _PendingCleanup | _PendingWrite | _PendingUsage | _PendingScan


class ControlHandler:
    """Handles calls. It answers each call exactly once, or never if its web worker has cancelled it or is gone."""

    def __init__(
        self,
        *,
        specs: Mapping[str, ModelSpec],
        residency: Residency,
        voices: VoiceStore,
        consents: ConsentStore,
        voices_folder: FolderWatch,
        buffer: AudioBuffer,
        submit: Callable[[Request], None],
        check_model: Callable[[str], None],
        find_speech: Callable[[FindSpeech], SpeechOutcome],
        find_usage: Callable[[FindUsage], None],
        empty_cache: Callable[[CacheName], None],
        take_settings: Callable[[Mapping[str, str]], None],
        settings: Callable[[], dict[str, Any]],
        clock: Callable[[], float],
    ) -> None:
        """`submit` queues a request, `check_model` refuses an unknown model; both raise JobError during a drain.

        `find_speech` raises JobError if the request is unknown, `take_settings` if a variable cannot be taken.
        `settings` returns the settings in force.
        """
        self._specs = specs
        self._residency = residency
        self._voices = voices
        self._consents = consents
        self._voices_folder = voices_folder
        self._buffer = buffer
        self._submit = submit
        self._check_model = check_model
        self._find_speech = find_speech
        self._find_usage = find_usage
        self._empty_cache = empty_cache
        self._take_settings = take_settings
        self._settings = settings
        self._clock = clock
        self._pending: list[_Pending] = []

    def handle(self, peer: bytes, call: Call, payload: bytes | None, answer: Answer) -> None:
        """Carry out `call` of the web worker `peer`. `answer` is called once, now or when the call has ended."""
        self._carry_out(_Caller(peer, call.id, answer), call, payload, may_scan=True)

    def _carry_out(self, caller: _Caller, call: Call, payload: bytes | None, *, may_scan: bool) -> None:
        try:
            reply = self._dispatch(caller, call, payload)
        except JobError as error:
            if may_scan and isinstance(error, OutdatedError):
                self._pending.append(_PendingScan(caller, self._voices_folder.scan(), call, payload))
            else:
                caller.fail(error)
            return
        if reply is not None:
            caller.answer(reply)

    def forget(self, peer: bytes, call_id: str | None = None) -> None:
        """Never answer that call, or any call of `peer` if there is no `call_id`. What the call started goes on.

        The request that designs a voice has the call's peer and id, so the worker cancels it like any other request.
        """
        self._pending = [
            pending
            for pending in self._pending
            if pending.caller.peer != peer or (call_id is not None and pending.caller.call_id != call_id)
        ]

    def answer_finished(self) -> None:
        """Answer the calls whose model transition or cleanup pass has ended."""
        for pending in list(self._pending):
            result = self._result_of(pending)
            if result is not None:
                self._pending.remove(pending)
                pending.caller.answer(result)

    def fail_pending(self, error: JobError) -> None:
        """Fail every pending call: the process ends."""
        for pending in self._pending:
            failed = failed_message(pending.caller.call_id, error)
            if isinstance(pending, _PendingWrite):  # the disk may still take it
                write = pending.write
                message = f"{error.message}; the {write.noun} may be {write.participle} all the same"
                failed = msgspec.structs.replace(failed, message=message)
            pending.caller.answer(failed)
        self._pending.clear()

    def on_voices_report(self, report: VoiceWritten | FolderScanned) -> None:
        """Record the end of a write or of a scan, and answer the calls that have waited for it."""
        if isinstance(report, FolderScanned):
            self._on_folder_scanned(report)
        else:
            self._on_voice_written(report)

    def _on_voice_written(self, report: VoiceWritten) -> None:
        result: JobError | SavedVoice | VoiceConsent | PortableVoice
        store = self._consents if isinstance(report.write.record, ConsentRecord) else self._voices
        try:
            result = store.on_written(report)
            result = report.exported or result
        except JobError as error:
            result = error
        for pending in list(self._pending):
            if isinstance(pending, _PendingWrite) and pending.write is report.write:
                self._pending.remove(pending)
                call_id = pending.caller.call_id
                match result:
                    case JobError():
                        pending.caller.fail(result)
                    case SavedVoice():
                        pending.caller.answer(Reply(id=call_id, voice=result))
                    case VoiceConsent():
                        pending.caller.answer(Reply(id=call_id, consent=result))
                    case PortableVoice():
                        pending.caller.answer(Reply(id=call_id, exported=result))

    def _on_folder_scanned(self, scan: FolderScanned) -> None:
        self._voices_folder.on_scanned()
        if scan.voices is not None:
            self._voices.on_scanned(scan.voices)
        if scan.consents is not None:
            self._consents.on_scanned(scan.consents)
        for pending in list(self._pending):
            if isinstance(pending, _PendingScan) and pending.number <= self._voices_folder.scanned:
                self._pending.remove(pending)
                self._carry_out(pending.caller, pending.call, pending.payload, may_scan=False)

    def on_usage_found(self, report: UsageFound) -> None:
        """Answer the call that asked for these rows, if it is still pending."""
        for pending in list(self._pending):
            if isinstance(pending, _PendingUsage) and pending.find is report.find:
                self._pending.remove(pending)
                if report.problem:
                    pending.caller.fail(JobError("internal_error", f"the usage cannot be read: {report.problem}"))
                else:
                    reply = Reply(
                        id=pending.caller.call_id,
                        usage=report.rows,
                        usage_source=report.source,
                        has_more=report.has_more,
                    )
                    pending.caller.answer(reply)

    def on_model_refused(self, model: str, error: JobError) -> None:
        """Fail the pending loads of a model that cannot be brought to the device."""
        self._fail(_PendingLoad, model, error)

    def _dispatch(self, caller: _Caller, call: Call, payload: bytes | None) -> Reply | None:
        """Carry out the action; None if the answer comes later."""
        match call.action:
            case LoadModel(model=model, keep_alive_s=keep_alive_s):
                self._load(caller, model, keep_alive_s)
            case UnloadModel(model=model):
                self._unload(caller, model)
            case PinModel(model=model, pinned=pinned):
                self._check_known(model)
                self._residency.pin(model, pinned)
                return Reply(id=call.id, model=self._residency.status(model))
            case Cleanup():
                self._residency.start_cleanup()
                self._pending.append(_PendingCleanup(caller))
            case FindSpeech() | EmptyCache() | Reload():
                return self._answer_now(call.id, call.action)
            case FindUsage():
                self._pending.append(_PendingUsage(caller, call.action))
                self._find_usage(call.action)
            case (
                FindVoice()
                | CloneVoice()
                | DesignVoice()
                | UpdateVoice()
                | DeleteVoice()
                | ExportVoice()
                | ImportVoice()
            ):
                return self._dispatch_voice(caller, call, call.action, payload)
            case CreateConsent() | FindConsent() | ListConsents() | RenameConsent() | DeleteConsent():
                return self._dispatch_consent(caller, call, call.action, payload)
            case _:
                assert_never(call.action)
        return None

    def _answer_now(self, call_id: str, action: FindSpeech | EmptyCache | Reload) -> Reply:
        match action:
            case FindSpeech():
                return Reply(id=call_id, speech=self._find_speech(action))
            case EmptyCache(name=name):
                self._empty_cache(name)
                return Reply(id=call_id)
            case Reload(variables=variables):
                self._take_settings(variables)
                return Reply(id=call_id, settings=self._settings())
            case _:
                assert_never(action)

    def _dispatch_voice(self, caller: _Caller, call: Call, action: VoiceAction, payload: bytes | None) -> Reply | None:
        """As `_dispatch`, for voices."""
        access, by = call.access, call.client
        match action:
            case FindVoice(name=name):
                if (voice := self._voices.find(name, access)) is None:
                    raise OutdatedError("voice_not_found", f"there is no saved voice {name!r}", param="voice")
                return Reply(id=call.id, voice=voice)
            case CloneVoice():
                write = self._voices.create(
                    action.name,
                    payload or b"",
                    kind="clone",
                    text=action.text,
                    description=action.description,
                    consent=action.consent,
                    access=access,
                    shared=action.shared,
                    by=by,
                )
            case DesignVoice():
                if payload is None:
                    self._design(caller, call, action)
                else:
                    self._save_design(caller, call, action, payload, action.script or None)
                return None
            case UpdateVoice(id=voice_id, name=name, shared=shared):
                write = self._voices.update(voice_id, name=name, shared=shared, access=access, by=by)
            case DeleteVoice(id=voice_id):
                write = self._voices.delete(voice_id, access, by=by)
            case ExportVoice(id=voice_id):
                write = self._voices.export(voice_id, self._consents, access, by=by)
            case ImportVoice():
                write = self._import(call, action)
            case _:
                assert_never(action)
        self._pending.append(_PendingWrite(caller, write))
        return None

    def _dispatch_consent(
        self, caller: _Caller, call: Call, action: ConsentAction, payload: bytes | None
    ) -> Reply | None:
        """As `_dispatch`, for consents."""
        access, by = call.access, call.client
        match action:
            case FindConsent(id=consent_id):
                return Reply(id=caller.call_id, consent=self._consents.find(consent_id, access))
            case ListConsents(limit=limit, after=after):
                consents, has_more = self._consents.list(limit, after, access)
                return Reply(id=caller.call_id, consents=consents, has_more=has_more)
            case CreateConsent(name=name, language=language):
                write = self._consents.create(name, language, payload or b"", access=access, by=by)
            case RenameConsent(id=consent_id, name=name):
                write = self._consents.rename(consent_id, name, access, by=by)
            case DeleteConsent(id=consent_id):
                write = self._consents.delete(consent_id, access, by=by)
            case _:
                assert_never(action)
        self._pending.append(_PendingWrite(caller, write))
        return None

    def _load(self, caller: _Caller, model: str, keep_alive_s: float | None) -> None:
        self._check_model(model)
        self._residency.load(model, keep_alive_s)
        # The later of a load and an unload wins.
        self._fail(_PendingUnload, model, JobError("model_busy", f"{model} was to be loaded meanwhile", param="model"))
        self._pending.append(_PendingLoad(caller, model))

    def _unload(self, caller: _Caller, model: str) -> None:
        self._check_known(model)
        try:
            self._residency.unload(model)
        except ModelBusyError as error:
            raise JobError("model_busy", str(error), param="model") from error
        self._fail(_PendingLoad, model, JobError("model_busy", f"{model} was unloaded meanwhile", param="model"))
        self._pending.append(_PendingUnload(caller, model))

    def _check_known(self, model: str) -> None:
        if model not in self._specs:
            raise JobError("model_not_found", f"there is no model {model!r}", param="model")

    def _fail(self, kind: type[_PendingLoad | _PendingUnload], model: str, error: JobError) -> None:
        """Fail the pending loads, or unloads, of `model`."""
        for pending in list(self._pending):
            if isinstance(pending, kind) and pending.model == model:
                self._pending.remove(pending)
                pending.caller.fail(error)

    def _result_of(self, pending: _Pending) -> Message | None:
        """The answer to a pending call, or None while it has not ended."""
        call_id = pending.caller.call_id
        match pending:
            case _PendingCleanup():
                running = self._residency.cleanup_running
                return None if running else Reply(id=call_id, cleanup=self._residency.last_cleanup)
            case _PendingLoad(model=model):
                status = self._residency.status(model)
                loaded = self._residency.is_settled(model) and status.state == "resident"
                return Reply(id=call_id, model=status) if loaded else None
            case _PendingUnload(model=model):
                return self._result_of_unload(call_id, model)
            case _PendingWrite() | _PendingUsage() | _PendingScan():
                return None  # see on_voices_report, on_usage_found
            case _:
                assert_never(pending)

    def _result_of_unload(self, call_id: str, model: str) -> Message | None:
        status = self._residency.status(model)
        if not self._residency.is_settled(model):
            return None
        if status.state in {"absent", "unavailable"}:  # unavailable: absent, and its weights are not on the disk either
            return Reply(id=call_id, model=status)
        if status.references:
            message = f"{model} was asked to speak before it could be unloaded"
            return failed_message(call_id, JobError("model_busy", message, param="model"))
        return None

    def _design(self, caller: _Caller, call: Call, action: DesignVoice) -> None:
        """Let the voice-design model speak a text, and save the recording as a voice."""
        spec = next((spec for spec in self._specs.values() if spec.task == "VoiceDesign"), None)
        if spec is None:
            raise JobError("model_unavailable", "no model of the catalogue designs voices", retry_after_s=60)
        self._voices.check_new(action.name, call.access)
        pcm = bytearray()

        def collect(message: Message, payload: bytes | None) -> None:
            match message:
                case Audio():
                    pcm.extend(payload or b"")
                case Finished(reason="stop"):
                    self._save_design(caller, call, action, bytes(pcm), action.script or DESIGN_TEXT)
                case Finished():
                    reason = "the model did not come to an end of what it said; try again"
                    caller.fail(JobError("synthesis_failed", reason))
                case Failed():
                    caller.answer(message)

        self._submit(
            Request(
                peer=caller.peer,
                id=caller.call_id,
                client=call.client,
                model=spec.id,
                is_batch=action.priority == "batch",
                limits=action.limits,
                sink=Sink(caller.call_id, collect, credit=_UNLIMITED, buffer=self._buffer),
                keep_alive_s=None,
                arrived_at=self._clock(),
                job=Job(
                    id=f"design-{uuid.uuid4().hex}",
                    task="VoiceDesign",
                    segments=[Segment(text=action.script or DESIGN_TEXT)],
                    instructions=action.prompt,
                    language="auto" if action.script else "english",
                    sampling=Sampling(max_new_tokens=DESIGN_MAX_FRAMES),
                ),
            ),
        )

    def _import(self, call: Call, action: ImportVoice) -> VoiceWrite:
        """Save a voice of another server with its consent; nothing is saved if the voice is refused."""
        voice = action.voice
        self._voices.check_new(voice.name, call.access)
        check_recording(voice.pcm, "file")
        check_transcript(voice.text or "", voice.pcm)
        consent_id = ""
        if (consent := voice.consent) is not None:
            saving = self._consents.create(
                consent.name,
                consent.language,
                consent.pcm,
                consent.created_at,
                access=call.access,
                by=call.client,
            )
            consent_id = saving.record.id
        return self._voices.create(
            voice.name,
            voice.pcm,
            kind=voice.kind,
            text=voice.text,
            prompt=voice.prompt,
            description=voice.description,
            consent=consent_id,
            access=call.access,
            shared=action.shared,
            is_imported=True,
            by=call.client,
        )

    def _save_design(self, caller: _Caller, call: Call, action: DesignVoice, pcm: bytes, text: str | None) -> None:
        try:
            write = self._voices.create(
                name=action.name,
                kind="design",
                pcm=pcm,
                text=text,
                prompt=action.prompt,
                description=action.description or action.prompt,
                access=call.access,
                shared=action.shared,
                by=call.client,
            )
        except JobError as error:
            caller.fail(error)
        else:
            self._pending.append(_PendingWrite(caller, write))
