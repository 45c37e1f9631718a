"""The Engine protocol, and the Structs that the synthesis loop and an engine exchange.

An engine owns one loaded model: its weights, its slots and the jobs in them.
It must not know clients, queues, credits or ZeroMQ.
All methods but `memory` are called by the synthesis thread. While no job of the model is admitted, the mover thread
calls `offload`, `restore` and `close`. A parked job counts as admitted there.
"""

import hashlib
from collections.abc import Collection
from typing import Final, Literal, Protocol

import msgspec

from shared.pcm import SILENCE_PIECE_S, bytes_for
from shared.protocol import CacheName, CacheStats, LimitName, RateLimit, Sampling, Segment, Task, Usage, Word

FinishReason = Literal["stop", "length", "empty"]
"""`stop`: the model ended the speech. `length`: a limit on the number of frames ended it.
`empty`: nothing in the text of an open job was speakable.
"""


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """The recording whose voice is cloned.

    `pcm` is 24 kHz mono int16 little-endian.
    With a transcript (`text`) the clone is in-context (ICL): the model continues the recording.
    With `x_vector_only` only the speaker embedding is used, and `text` is ignored.
    `key` identifies the encoded reference in the cache: equal keys mean the same recording in the same mode.
    The transcript is not part of the key, because encoding does not use it.
    """

    key: str
    pcm: bytes
    text: str | None = None
    x_vector_only: bool = False

    @classmethod
    def of(cls, pcm: bytes, *, text: str | None, x_vector_only: bool) -> "Reference":
        """The reference for a recording that came with a request: the key is the SHA-256 of the recording."""
        digest = hashlib.sha256(pcm).hexdigest()
        key = f"{digest}/x-vector" if x_vector_only else digest
        return cls(key=key, pcm=pcm, text=text, x_vector_only=x_vector_only)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request to speak, already resolved: `voice` and `language` are the model's own names.

    `voice` is "" for a task without named voices (VoiceDesign, Base).
    `language` is "auto" or one of the model's languages in lower case ("english").
    `non_streaming_mode` is the text layout of Qwen3-TTS (the whole text before the first frame), not the transport.
    `open`: the text of the last segment goes on with `Engine.append`. There may be no segment yet.
    """

    id: str
    task: Task
    segments: list[Segment]
    voice: str = ""
    language: str = "auto"
    instructions: str = ""
    reference: Reference | None = None
    sampling: Sampling = Sampling()
    non_streaming_mode: bool | None = None
    timestamps: bool = False
    open: bool = False

    @property
    def text(self) -> str:
        """The text of all segments."""
        return "".join(segment.text for segment in self.segments)


PAUSE_CHUNK_BYTES: Final = bytes_for(SILENCE_PIECE_S)
"""The silence of a pause comes in pieces of this size at most, one a step, as speech does."""


class Pcm(msgspec.Struct, frozen=True):
    """The next part of a job's speech: 24 kHz mono int16. `rate` and `words`: see shared.protocol.Audio."""

    job_id: str
    data: bytes
    rate: float | None = 1.0
    words: list[Word] = []


class Done(msgspec.Struct, frozen=True):
    """A job is complete, and its slot is free."""

    job_id: str
    reason: FinishReason
    usage: Usage


class Fault(msgspec.Struct, frozen=True):
    """A job failed, and its slot is free. The other jobs are not affected."""

    job_id: str
    error: "JobError"


Event = Pcm | Done | Fault


class JobError(Exception):
    """A job is impossible or has failed; `code` is an error code of the HTTP API.

    Engines raise these codes: for errors of the client `invalid_value`, `voice_not_found`, `task_mismatch` and
    `invalid_audio`, for errors of the service `insufficient_vram`, `model_unavailable`, `queue_full` and
    `synthesis_failed`. `param` names the request field at fault, if there is one.
    `rate_limit`: what the key of a refused request has left of its requests a minute. `limit` is what it was over.
    """

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.rate_limit: RateLimit | None = None
        self.limit: LimitName | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that an engine holds on its device, and in host RAM while it is offloaded.

    The keys are purposes: "weights", "kv", "state", "codec_state", "references", "graphs", "workspace".
    `host` has "parked" while jobs are parked: what `park` returned for them.
    The codec, which several engines share, is not included.
    """

    device: dict[str, int] = {}
    host: dict[str, int] = {}


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of an engine since its load.

    `batch_sizes`: frames (or the engine's other units of work) by the number of jobs that shared them.
    `captured_steps`: decode steps that replayed captured functions alone; `eager_steps`: the others.
    `caches` are its own, without a model's name.
    """

    batch_sizes: dict[int, int] = {}
    captured_steps: int = 0
    eager_steps: int = 0
    caches: list[CacheStats] = []


class Engine(Protocol):
    """One loaded model. The first lines of the module say which thread calls which method."""

    def warm_up(self) -> None:
        """Do once, on the synthesis thread, what the first job would wait for. Call it after a load or a restore.

        Libraries of CUDA keep handles and workspaces for each thread: what the mover warmed up is cold here.
        """

    def capacity(self) -> int:
        """The number of further jobs that `admit` accepts now."""

    def admit(self, job: Job) -> None:
        """Take a job into a free slot. Call it only if `capacity()` is above 0.

        Returns quickly: slow preparation (encoding a reference) runs beside the steps.

        Raises:
            JobError: the job is impossible. It holds no slot then.
        """

    def append(self, job_id: str, text: str, *, flush: bool) -> None:
        """Add text to an open job, parked or not. `flush`: the segment ends behind it. Cheap: the next step reads it.

        The speech equals that of the whole text, however it was cut into pieces, with one segment for each flush.
        An unknown id is ignored, and so is text behind `end_text`.
        """

    def end_text(self, job_id: str) -> None:
        """The text of an open job is complete. An unknown id is ignored."""

    def waits_for_text(self, job_id: str) -> bool:
        """True if an open job, parked or not, can make no audio before more of its text comes.

        `step` need not be called for such a job. Its first utterance begins with the first text that is sure.
        """

    def is_faster_alone(self) -> bool:
        """True if a step of one job takes much less time than one of all slots.

        Then others may leave a step to a job that has made no audio yet.
        """

    def runnable(self, held_back: Collection[str]) -> bool:
        """True if `step(held_back)` would do work now."""

    def step(self, held_back: Collection[str]) -> list[Event]:
        """Do one unit of work for all admitted jobs except those in `held_back`, and return what it produced.

        For Qwen3-TTS the unit is one frame (80 ms) for each job.
        If a single job fails, the error is a Fault event; if `step` raises, the engine itself is broken.
        The exception is torch's out-of-memory error: all jobs stay admitted, and the step can be repeated.
        """

    def park(self, job_id: str) -> int:
        """Take a job off its slot, which is free when `park` returns. Returns the bytes of host RAM kept for the job.

        Any admitted job can be parked between two steps, any number of times, and `step` leaves it out until `unpark`.
        An utterance in the midst of its speech keeps its state. A job keeps 0 bytes while its reference is being
        encoded, before its prompt is read, and between two utterances.

        Audio that was decoded before still comes from the next steps, in order. The job's Done may come with it;
        then the job is over, as any other. So call `runnable` and `step` as ever.
        An unknown id, such as that of a job that is over, is ignored: 0. A parked job stays parked: the same bytes.

        Raises:
            torch.OutOfMemoryError, MemoryError: no host RAM is left. The job is in its slot, as before the call.
        """

    def park_bytes(self, job_id: str) -> int:
        """The bytes of host RAM that `park` would keep for the job now; 0 between two utterances.

        `park` may keep up to 4 MiB more, as host memory is allocated in powers of two. Cheap enough for every step.
        """

    def unpark(self, job_id: str) -> None:
        """Put a parked job into a free slot, where it goes on as if it had never been parked, bit for bit.

        Call it only if `capacity()` is above 0. An id that is not parked is ignored. Allocates no device memory.
        """

    def cancel(self, job_id: str) -> None:
        """Drop a job, parked or not, and free its slot at once. An unknown id is ignored."""

    def offload(self) -> None:
        """Move the weights to host RAM and free the device's memory. No job may be admitted or parked."""

    def restore(self) -> None:
        """Move offloaded weights back to the device, ready to speak."""

    def close(self) -> None:
        """Free everything, parked jobs too. The engine must not be used afterwards."""

    def memory(self) -> Memory:
        """Bytes that the engine holds, by place and purpose. Any thread may call it."""

    def stats(self) -> EngineStats:
        """The engine's counters. The loop calls this several times a second."""

    def empty_cache(self, name: CacheName) -> None:
        """Drop what a cache keeps, if the engine has one of that name. Jobs keep what they use."""
