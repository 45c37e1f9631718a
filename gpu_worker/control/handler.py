"""Calls of the web workers: each is carried out at once, or answered later when what it waits for has ended.

Owned by the synthesis thread. ControlHandler moves no model, synthesizes nothing and writes no file:
it asks Residency, and hands calls on voices and consents to VoiceCalls.
"""

from collections.abc import Callable, Mapping
from typing import Any, assert_never

from gpu_worker.control.pending import (
    Answer,
    Caller,
    PendingCall,
    PendingCalls,
    PendingCleanup,
    PendingLoad,
    PendingScan,
    PendingUnload,
    PendingUsage,
    PendingWrite,
)
from gpu_worker.control.voice_calls import VoiceCalls
from gpu_worker.control.voice_design import VoiceDesigner
from gpu_worker.engines.base import JobError
from gpu_worker.keys import UsageFound
from gpu_worker.requests import AudioBuffer, Request, failed_message
from gpu_worker.residency import ModelBusyError, Residency
from gpu_worker.voices import ConsentStore, FolderScanned, FolderWatch, OutdatedError, VoiceStore, VoiceWritten
from shared.catalog import ModelSpec
from shared.protocol import (
    CacheName,
    Call,
    Cleanup,
    CloneVoice,
    CreateConsent,
    DeleteConsent,
    DeleteVoice,
    DesignVoice,
    EmptyCache,
    ExportVoice,
    FindConsent,
    FindSpeech,
    FindUsage,
    FindVoice,
    ImportVoice,
    ListConsents,
    LoadModel,
    Message,
    PinModel,
    Reload,
    RenameConsent,
    Reply,
    SpeechOutcome,
    UnloadModel,
    UpdateVoice,
)


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
        self._check_model = check_model
        self._find_speech = find_speech
        self._find_usage = find_usage
        self._empty_cache = empty_cache
        self._take_settings = take_settings
        self._settings = settings
        self._pending = PendingCalls()
        designer = VoiceDesigner(specs.values(), buffer=buffer, submit=submit, clock=clock)
        self._voice_calls = VoiceCalls(voices, consents, designer=designer, pending=self._pending)

    def handle(self, peer: bytes, call: Call, payload: bytes | None, answer: Answer) -> None:
        """Carry out `call` of the web worker `peer`. `answer` is called once, now or when the call has ended."""
        self._carry_out(Caller(peer, call.id, answer), call, payload, may_scan=True)

    def _carry_out(self, caller: Caller, call: Call, payload: bytes | None, *, may_scan: bool) -> None:
        try:
            reply = self._dispatch(caller, call, payload)
        except JobError as error:
            if may_scan and isinstance(error, OutdatedError):
                self._pending.add(PendingScan(caller, self._voices_folder.scan(), call, payload))
            else:
                caller.fail(error)
            return
        if reply is not None:
            caller.answer(reply)

    def forget(self, peer: bytes, call_id: str | None = None) -> None:
        """Never answer that call, or any call of `peer` if there is no `call_id`. The call's work goes on.

        The request that designs a voice has the call's peer and id, so the worker cancels it like any other request.
        """
        self._pending.forget(peer, call_id)

    def answer_finished(self) -> None:
        """Answer the calls whose model transition or cleanup pass has ended."""
        for pending in self._pending:
            result = self._result_of(pending)
            if result is not None:
                self._pending.remove(pending)
                pending.caller.answer(result)

    def fail_pending(self, error: JobError) -> None:
        """Fail every pending call: the process ends."""
        self._pending.fail_all(error)

    def on_voices_report(self, report: VoiceWritten | FolderScanned) -> None:
        """Record the end of a write or of a scan, and answer the calls that have waited for it."""
        if isinstance(report, FolderScanned):
            self._on_folder_scanned(report)
        else:
            self._voice_calls.on_written(report)

    def _on_folder_scanned(self, scan: FolderScanned) -> None:
        self._voices_folder.on_scanned()
        if scan.voices is not None:
            self._voices.on_scanned(scan.voices)
        if scan.consents is not None:
            self._consents.on_scanned(scan.consents)
        for pending in self._pending.take(PendingScan, lambda pending: pending.number <= self._voices_folder.scanned):
            self._carry_out(pending.caller, pending.call, pending.payload, may_scan=False)

    def on_usage_found(self, report: UsageFound) -> None:
        """Answer the call that asked for these rows, if it is still pending."""
        for pending in self._pending.take(PendingUsage, lambda pending: pending.find is report.find):
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
        self._fail(PendingLoad, model, error)

    def _dispatch(self, caller: Caller, call: Call, payload: bytes | None) -> Reply | None:
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
                self._pending.add(PendingCleanup(caller))
            case FindSpeech() | EmptyCache() | Reload():
                return self._answer_now(call.id, call.action)
            case FindUsage():
                self._pending.add(PendingUsage(caller, call.action))
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
                return self._voice_calls.on_voice(caller, call, call.action, payload)
            case CreateConsent() | FindConsent() | ListConsents() | RenameConsent() | DeleteConsent():
                return self._voice_calls.on_consent(caller, call, call.action, payload)
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

    def _load(self, caller: Caller, model: str, keep_alive_s: float | None) -> None:
        self._check_model(model)
        self._residency.load(model, keep_alive_s)
        # The later of a load and an unload wins.
        self._fail(PendingUnload, model, JobError("model_busy", f"{model} was to be loaded meanwhile", param="model"))
        self._pending.add(PendingLoad(caller, model))

    def _unload(self, caller: Caller, model: str) -> None:
        self._check_known(model)
        try:
            self._residency.unload(model)
        except ModelBusyError as error:
            raise JobError("model_busy", str(error), param="model") from error
        self._fail(PendingLoad, model, JobError("model_busy", f"{model} was unloaded meanwhile", param="model"))
        self._pending.add(PendingUnload(caller, model))

    def _check_known(self, model: str) -> None:
        if model not in self._specs:
            raise JobError("model_not_found", f"there is no model {model!r}", param="model")

    def _fail(self, kind: type[PendingLoad | PendingUnload], model: str, error: JobError) -> None:
        """Fail the pending loads, or unloads, of `model`."""
        for pending in self._pending.take(kind, lambda pending: pending.model == model):
            pending.caller.fail(error)

    def _result_of(self, pending: PendingCall) -> Message | None:
        """The answer to a pending call, or None while it has not ended."""
        call_id = pending.caller.call_id
        match pending:
            case PendingCleanup():
                running = self._residency.cleanup_running
                return None if running else Reply(id=call_id, cleanup=self._residency.last_cleanup)
            case PendingLoad(model=model):
                status = self._residency.status(model)
                loaded = self._residency.is_settled(model) and status.state == "resident"
                return Reply(id=call_id, model=status) if loaded else None
            case PendingUnload(model=model):
                return self._result_of_unload(call_id, model)
            case PendingWrite() | PendingUsage() | PendingScan():
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
