"""The calls on saved voices and their consents. Most are answered when the folder of voices has been written."""

from typing import assert_never

from gpu_worker.control.pending import Caller, PendingCalls, PendingWrite
from gpu_worker.control.voice_design import VoiceDesigner
from gpu_worker.engines.base import JobError
from gpu_worker.voices import (
    ConsentRecord,
    ConsentStore,
    OutdatedError,
    VoiceStore,
    VoiceWrite,
    VoiceWritten,
    check_recording,
    check_transcript,
)
from shared.protocol import (
    Call,
    CloneVoice,
    ConsentAction,
    CreateConsent,
    DeleteConsent,
    DeleteVoice,
    DesignVoice,
    ExportVoice,
    FindConsent,
    FindVoice,
    ImportVoice,
    ListConsents,
    PortableVoice,
    RenameConsent,
    Reply,
    SavedVoice,
    UpdateVoice,
    VoiceAction,
    VoiceConsent,
)


class VoiceCalls:
    """Hands voices to the VoiceStore and consents to the ConsentStore, which write them."""

    def __init__(
        self, voices: VoiceStore, consents: ConsentStore, *, designer: VoiceDesigner, pending: PendingCalls
    ) -> None:
        self._voices = voices
        self._consents = consents
        self._designer = designer
        self._pending = pending

    def on_voice(self, caller: Caller, call: Call, action: VoiceAction, payload: bytes | None) -> Reply | None:
        """Carry out an action on a voice; None if the answer comes later."""
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
        self._pending.add(PendingWrite(caller, write))
        return None

    def on_consent(self, caller: Caller, call: Call, action: ConsentAction, payload: bytes | None) -> Reply | None:
        """Carry out an action on a consent; None if the answer comes later."""
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
        self._pending.add(PendingWrite(caller, write))
        return None

    def on_written(self, report: VoiceWritten) -> None:
        """Record the end of a write, and answer the call that has waited for it."""
        result: JobError | SavedVoice | VoiceConsent | PortableVoice
        store = self._consents if isinstance(report.write.record, ConsentRecord) else self._voices
        try:
            result = store.on_written(report)
            result = report.exported or result
        except JobError as error:
            result = error
        for pending in self._pending.take(PendingWrite, lambda pending: pending.write is report.write):
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

    def _design(self, caller: Caller, call: Call, action: DesignVoice) -> None:
        model = self._designer.model()
        self._voices.check_new(action.name, call.access)
        self._designer.design(
            model, caller, call, action, lambda pcm, text: self._save_design(caller, call, action, pcm, text)
        )

    def _save_design(self, caller: Caller, call: Call, action: DesignVoice, pcm: bytes, text: str | None) -> None:
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
            self._pending.add(PendingWrite(caller, write))

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
