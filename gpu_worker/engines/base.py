"""The Engine protocol: what the synthesis loop asks of a model, and the Structs that cross that line.

An engine owns one loaded model: its weights, its slots and the jobs in them.
It knows nothing of clients, queues, credits or ZeroMQ.
Every method but `memory` is called from the synthesis thread,
or from the loader thread while no job of that model is admitted (open, offload, restore, close).
"""

import hashlib
from collections.abc import Collection
from typing import Literal, Protocol

import msgspec

from shared.protocol import Sampling, Task, Usage

__all__ = [
    "Done",
    "Engine",
    "Event",
    "Fault",
    "FinishReason",
    "Job",
    "JobError",
    "Memory",
    "Pcm",
    "Reference",
    "Sampling",
    "Task",
    "Usage",
]

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended by itself. `length`: a cap on the number of frames ended it."""


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """The recording a cloned voice speaks like.

    `pcm` is 24 kHz mono int16 little-endian.
    With `text` (its transcript) the clone is in-context (ICL);
    with `x_vector_only` the speaker embedding alone is used and `text` is ignored.
    `key` names what is encoded of it, for the cache of encoded recordings: equal keys mean equal recordings
    and one mode. The transcript is no part of it: encoding does not look at it.
    """

    key: str
    pcm: bytes
    text: str | None = None
    x_vector_only: bool = False

    @classmethod
    def of(cls, pcm: bytes, *, text: str | None, x_vector_only: bool) -> "Reference":
        """A recording that came with a request."""
        digest = hashlib.sha256(pcm).hexdigest()
        key = f"{digest}/x-vector" if x_vector_only else digest
        return cls(key=key, pcm=pcm, text=text, x_vector_only=x_vector_only)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request to speak, already resolved: `voice` and `language` are names the model itself uses.

    `voice` is "" where the task takes none (a described or a cloned voice).
    `language` is "auto" or one of the model's languages in lower case ("english").
    `non_streaming_mode` is Qwen3-TTS's text layout (the whole text before the first frame), not transport.
    """

    id: str
    task: Task
    text: str
    voice: str = ""
    language: str = "auto"
    instructions: str = ""
    reference: Reference | None = None
    sampling: Sampling = Sampling()
    non_streaming_mode: bool | None = None


class Pcm(msgspec.Struct, frozen=True):
    """Speech of one job, in order: 24 kHz mono int16 little-endian."""

    job_id: str
    data: bytes


class Done(msgspec.Struct, frozen=True):
    """A job has said everything; its slot is free."""

    job_id: str
    reason: FinishReason
    usage: Usage


class Fault(msgspec.Struct, frozen=True):
    """A job failed alone; its slot is free and its neighbours go on."""

    job_id: str
    error: "JobError"


Event = Pcm | Done | Fault


class JobError(Exception):
    """A job cannot be done; `code` is a code of the HTTP contract.

    The codes an engine raises: `invalid_value`, `voice_not_found`, `task_mismatch`, `invalid_audio`
    (the client's fault), `insufficient_vram`, `model_unavailable`, `synthesis_failed` (ours).
    `param` names the request field at fault, where there is one.
    """

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes an engine holds on its device and, offloaded, in host RAM.

    By purpose: "weights", "kv", "state", "codec_state", "references", "graphs", "workspace".
    What several engines share (the codec) is not counted here.
    """

    device: dict[str, int] = {}
    host: dict[str, int] = {}


class Engine(Protocol):
    """One loaded model. See the module's first lines for who calls what from which thread."""

    def capacity(self) -> int:
        """How many more jobs `admit` takes now."""
        ...

    def admit(self, job: Job) -> None:
        """Take a job; the caller has asked `capacity` first.

        Returns quickly: slow preparation (encoding a reference) happens beside the steps.
        Raises JobError where the job can be seen to be impossible; the job then holds nothing.
        """
        ...

    def runnable(self, stalled: Collection[str]) -> bool:
        """Whether `step` would do work now, leaving out the jobs in `stalled`."""
        ...

    def step(self, stalled: Collection[str]) -> list[Event]:
        """One unit of work for all admitted jobs together, leaving out the jobs in `stalled`.

        For Qwen3-TTS one frame (80 ms) for each job; events carry what became audible.
        A job's own trouble is a Fault event; an exception means that the engine itself is broken.
        Torch's out-of-memory error is raised as it is, with the jobs still admitted and the step repeatable.
        """
        ...

    def cancel(self, job_id: str) -> None:
        """Forget a job and free its slot at once; an unknown id is ignored."""
        ...

    def offload(self) -> None:
        """Move the weights to host RAM and give the device's memory back. No job is admitted."""
        ...

    def restore(self) -> None:
        """Bring offloaded weights back, ready to speak."""
        ...

    def close(self) -> None:
        """Free everything. The engine is not used again."""
        ...

    def memory(self) -> Memory:
        """Bytes held, by place and purpose. Callable from any thread."""
        ...
