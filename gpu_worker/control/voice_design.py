"""The design of a voice: the voice-design model speaks a text, and what it said becomes the voice's recording."""

import uuid
from collections.abc import Callable, Iterable
from typing import Final

from gpu_worker.control.pending import Caller
from gpu_worker.engines.base import Job, JobError
from gpu_worker.requests import AudioBuffer, Request, Sink
from shared.catalog import ModelSpec
from shared.protocol import Audio, Call, DesignVoice, Failed, Finished, Message, Sampling, Segment

DESIGN_TEXT: Final = (
    "This is how I sound when I speak at my ease. I take my time, I breathe between the words, "
    "and I try to let every sentence come out clear and natural."
)
"""The text that a designed voice speaks once; the recording of it is then cloned like any other."""

DESIGN_MAX_FRAMES: Final = 375
"""30 s, three times what the text takes: a model that does not stop makes no voice of half an hour."""

_UNLIMITED: Final = 2**62
"""Credit of the sink that collects a designed voice: it must never stall."""


class VoiceDesigner:
    """Submits requests to the voice-design model of the catalogue, if it has one."""

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        *,
        buffer: AudioBuffer,
        submit: Callable[[Request], None],
        clock: Callable[[], float],
    ) -> None:
        self._spec = next((spec for spec in specs if spec.task == "VoiceDesign"), None)
        self._buffer = buffer
        self._submit = submit
        self._clock = clock

    def model(self) -> str:
        """The id of the model; JobError (`model_unavailable`) without one."""
        if self._spec is None:
            raise JobError("model_unavailable", "no model of the catalogue designs voices", retry_after_s=60)
        return self._spec.id

    def design(
        self, model: str, caller: Caller, call: Call, action: DesignVoice, on_recording: Callable[[bytes, str], None]
    ) -> None:
        """Let the model speak; `on_recording` gets what it said, PCM and text. A failure is the call's answer."""
        pcm = bytearray()
        text = action.script or DESIGN_TEXT

        def collect(message: Message, payload: bytes | None) -> None:
            match message:
                case Audio():
                    pcm.extend(payload or b"")
                case Finished(reason="stop"):
                    on_recording(bytes(pcm), text)
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
                model=model,
                is_batch=action.priority == "batch",
                limits=action.limits,
                sink=Sink(caller.call_id, collect, credit=_UNLIMITED, buffer=self._buffer),
                keep_alive_s=None,
                arrived_at=self._clock(),
                job=Job(
                    id=f"design-{uuid.uuid4().hex}",
                    task="VoiceDesign",
                    segments=[Segment(text=text)],
                    instructions=action.prompt,
                    language="auto" if action.script else "english",
                    sampling=Sampling(max_new_tokens=DESIGN_MAX_FRAMES),
                ),
            ),
        )
