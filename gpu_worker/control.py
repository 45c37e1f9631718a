"""The calls: what a web worker can ask for besides speech, answered at once or when what was begun has ended.

Owned by the synthesis thread; it moves no model, speaks no word and writes no voice itself,
but asks `residency`, submits requests and hands `voice_writer` what is to be written.
"""

import uuid
from collections.abc import Callable, Mapping
from typing import Final, Literal

import msgspec
import structlog

from gpu_worker.engines.base import Job, JobError, Sampling
from gpu_worker.requests import CollectingSink, Request, failed_message
from gpu_worker.residency.manager import ModelBusyError, Residency
from gpu_worker.voices.store import VoiceStore
from gpu_worker.voices.writer import VoiceWrite, VoiceWriter, VoiceWritten
from shared.catalog import ModelSpec
from shared.protocol import (
    Call,
    Cleanup,
    CloneVoice,
    DeleteVoice,
    DesignVoice,
    FindVoice,
    LoadModel,
    Message,
    ModelStatus,
    PinModel,
    Reply,
    UnloadModel,
)

DESIGN_TEXT: Final = (
    "This is how I sound when I speak at my ease. I take my time, I breathe between the words, "
    "and I try to let every sentence come out clear and natural."
)
"""What a designed voice says once; the recording is the reference that it is cloned from ever after."""

DESIGN_MAX_FRAMES: Final = 375
"""30 s: three times what the text takes, so a model that does not stop is no voice of half an hour."""

log = structlog.get_logger(__name__)

Answer = Callable[[Message], None]


class _Pending(msgspec.Struct):
    """A call that waits until `model` is where it is to be; with "" for a model, until its pass or write has ended."""

    peer: bytes
    call_id: str
    model: str
    goal: Literal["resident", "absent", "clean"] | VoiceWrite
    answer: Answer


class ControlHandler:
    """Takes calls and answers each exactly once, unless whoever asked has left."""

    def __init__(
        self,
        *,
        specs: Mapping[str, ModelSpec],
        residency: Residency,
        voices: VoiceStore,
        writer: VoiceWriter,
        submit: Callable[[Request], None],
        require: Callable[[str], ModelSpec],
        clock: Callable[[], float],
    ) -> None:
        self._specs = specs
        self._residency = residency
        self._voices = voices
        self._writer = writer
        self._submit = submit
        self._require = require
        self._clock = clock
        self._pending: list[_Pending] = []

    def take(self, peer: bytes, call: Call, payload: bytes | None, answer: Answer) -> None:
        """Do what `call` of the web worker `peer` asks for; `answer` is called now or later, once."""
        try:
            reply = self._do(peer, call, payload, answer)
        except JobError as error:
            answer(failed_message(call.id, error))
            return
        if reply is not None:
            answer(reply)

    def forget(self, peer: bytes, call_id: str | None = None) -> None:
        """Nobody waits for that call any more, or for any call of `peer`; what it began goes on.

        The speech of a design is a request of `peer` by the call's id, and is dropped like any other.
        """
        self._pending = [
            pending
            for pending in self._pending
            if pending.peer != peer or (call_id is not None and pending.call_id != call_id)
        ]

    def answer_ended(self) -> None:
        """Answer the calls whose model or pass has come to an end."""
        for pending in list(self._pending):
            outcome = self._outcome(pending)
            if outcome is not None:
                self._pending.remove(pending)
                pending.answer(outcome)

    def end(self, error: JobError) -> None:
        """Nothing is going to happen any more: every call that waits fails."""
        for pending in self._pending:
            failed = failed_message(pending.call_id, error)
            if isinstance(pending.goal, VoiceWrite):  # whose end nobody will hear of
                message = f"{error.message}; the voice may be {pending.goal.done} all the same"
                failed = msgspec.structs.replace(failed, message=message)
            pending.answer(failed)
        self._pending.clear()

    def voice_written(self, report: VoiceWritten) -> None:
        """The write is on the disk or has failed: take note of it, and answer who still waits for it."""
        pending = next((pending for pending in self._pending if pending.goal is report.write), None)
        call_id = pending.call_id if pending is not None else ""
        outcome: Message
        try:
            outcome = Reply(id=call_id, voice=self._voices.written(report))
        except JobError as error:
            outcome = failed_message(call_id, error)
        if pending is not None:
            self._pending.remove(pending)
            pending.answer(outcome)

    def model_refused(self, model: str, error: JobError) -> None:
        """The model could not be brought to the device: calls that wait for it fail with the reason."""
        self._fail(model, "resident", error)

    def _do(self, peer: bytes, call: Call, payload: bytes | None, answer: Answer) -> Reply | None:
        match call.action:
            case LoadModel(model=model):
                self._require(model)
                self._residency.ask_load(model)
                # Of a load and an unload that meet, the later one counts.
                self._fail(
                    model, "absent", JobError("model_busy", f"{model} was to be loaded meanwhile", param="model")
                )
                self._pending.append(_Pending(peer, call.id, model, "resident", answer))
            case UnloadModel(model=model):
                self._unload(model)
                self._fail(model, "resident", JobError("model_busy", f"{model} was unloaded meanwhile", param="model"))
                self._pending.append(_Pending(peer, call.id, model, "absent", answer))
            case PinModel(model=model, pinned=pinned):
                self._known(model)
                self._residency.pin(model, pinned)
                return Reply(id=call.id, model=self._state_of(model))
            case Cleanup():
                self._residency.cleanup.start()
                self._pending.append(_Pending(peer, call.id, "", "clean", answer))
            case FindVoice(name=name):
                return Reply(id=call.id, voice=self._voices.find(name))
            case CloneVoice(name=name, text=text, description=description, consent=consent):
                write = self._voices.create(
                    name=name, kind="clone", pcm=payload or b"", text=text, description=description, consent=consent
                )
                self._write(peer, call.id, write, answer)
            case DesignVoice():
                self._design(peer, call, call.action, answer)
            case DeleteVoice(id=voice_id):
                self._write(peer, call.id, self._voices.delete(voice_id), answer)
        return None

    def _write(self, peer: bytes, call_id: str, write: VoiceWrite, answer: Answer) -> None:
        """Have it written, and the call answered when it has been."""
        self._pending.append(_Pending(peer, call_id, "", write, answer))
        self._writer.submit(write)

    def _unload(self, model: str) -> None:
        self._known(model)
        try:
            self._residency.ask_unload(model)
        except ModelBusyError as error:
            raise JobError("model_busy", str(error), param="model") from error

    def _known(self, model: str) -> None:
        if model not in self._specs:
            raise JobError("model_not_found", f"there is no model {model!r}", param="model")

    def _fail(self, model: str, goal: str, error: JobError) -> None:
        """What this goal needs is not going to happen."""
        for pending in [pending for pending in self._pending if (pending.model, pending.goal) == (model, goal)]:
            self._pending.remove(pending)
            pending.answer(failed_message(pending.call_id, error))

    def _outcome(self, pending: _Pending) -> Message | None:
        """The answer, once there is one."""
        if pending.goal == "clean":
            cleanup = self._residency.cleanup
            return None if cleanup.under_way else Reply(id=pending.call_id, cleanup=cleanup.last)
        if isinstance(pending.goal, VoiceWrite) or not self._residency.is_settled(pending.model):
            return None
        found = self._state_of(pending.model)
        # An absent model whose weights are not there is called unavailable.
        if found.state == pending.goal or (pending.goal, found.state) == ("absent", "unavailable"):
            return Reply(id=pending.call_id, model=found)
        if pending.goal == "absent" and found.references:
            message = f"{pending.model} was asked to speak before it could be unloaded"
            return failed_message(pending.call_id, JobError("model_busy", message, param="model"))
        return None

    def _state_of(self, model: str) -> ModelStatus:
        return next(state for state in self._residency.models() if state.id == model)

    def _design(self, peer: bytes, call: Call, action: DesignVoice, answer: Answer) -> None:
        """Let the voice-design model speak, and keep what it said."""
        spec = next((spec for spec in self._specs.values() if spec.task == "VoiceDesign"), None)
        if spec is None:
            raise JobError("model_unavailable", "no model of the catalogue designs voices", retry_after_s=60)
        self._voices.check_new(action.name)

        def done(result: bytes | JobError) -> None:
            try:
                if isinstance(result, JobError):
                    raise result
                write = self._voices.create(
                    name=action.name,
                    kind="design",
                    pcm=result,
                    text=DESIGN_TEXT,
                    description=action.description or action.prompt,
                )
            except JobError as error:
                answer(failed_message(call.id, error))
            else:
                self._write(peer, call.id, write, answer)

        self._submit(
            Request(
                peer=peer,
                request_id=call.id,
                client=call.client,
                model=spec.id,
                sink=CollectingSink(done),
                keep_alive_s=None,
                arrived=self._clock(),
                job=Job(
                    id=f"design-{uuid.uuid4().hex}",
                    task="VoiceDesign",
                    text=DESIGN_TEXT,
                    instructions=action.prompt,
                    language="english",
                    sampling=Sampling(max_new_tokens=DESIGN_MAX_FRAMES),
                ),
            ),
        )
