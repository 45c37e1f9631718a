"""The Qwen3-TTS engine: `step` makes one 80 ms frame for every job, and hands out what became audible.

It owns slots and the order of things within a step.
The arithmetic is the Generator's and the codec's, how they run is the Executor's, what a job is the Planner's.

A step on CUDA runs one frame ahead of what the host knows: it starts frame n + 1 before it reads frame n's codes,
so the device never waits for Python. The frame begun past a job's end is thrown away.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Final

import msgspec
import numpy as np
import torch

from gpu_worker.engines.base import Done, Event, Fault, Job, JobError, Memory, Pcm
from gpu_worker.engines.faults import is_broken_device, is_out_of_memory
from gpu_worker.engines.qwen.model.prompt import PromptBuilder, Voice
from gpu_worker.engines.qwen.model.sampling import uniforms
from gpu_worker.engines.qwen.model.slot_state import SlotState
from gpu_worker.engines.qwen.offload import WeightOffloader
from gpu_worker.engines.qwen.planner import Planner
from gpu_worker.engines.qwen.reference_cache import ReferenceCache
from gpu_worker.engines.qwen.runner import ModelRunner, PrefillInput
from gpu_worker.engines.qwen.runtime.transfers import HostCopy
from gpu_worker.engines.qwen.sequence import RunningJob, most_urgent_first
from gpu_worker.engines.qwen.vocoder import Vocoder
from shared.pcm import FRAME_SAMPLES, bytes_for, seconds_of

PREFILL_TOKENS: Final = 1024
"""Prompt tokens read in one step, at least one prompt: newcomers must not make the others stutter."""

DELIVERIES_BEHIND: Final = 2
"""Decoder calls that may be under way when a step returns, on CUDA."""


_log = logging.getLogger(__name__)


class Frame(msgspec.Struct, frozen=True):
    """Who took part in a frame, and with which of its utterances."""

    members: list[tuple[RunningJob, int]]


class Closing(msgspec.Struct, frozen=True):
    """An utterance's PCM is complete; `final`: and so is the job's."""

    speaking: RunningJob
    final: bool


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is assembled from."""

    state: SlotState
    runner: ModelRunner
    prompts: PromptBuilder
    planner: Planner
    vocoder: Vocoder
    references: ReferenceCache
    offloader: WeightOffloader


class QwenEngine:
    """See gpu_worker.engines.base.Engine."""

    def __init__(
        self, parts: Parts, *, slots: int, pause_s: float, cuda: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`pause_s`: silence between the utterances of a job. `clock` gives seconds."""
        self._parts = parts
        self._clock = clock
        self._end = parts.state.eos_code
        self._pause = bytes(bytes_for(pause_s))
        self._cuda = cuda
        self._free = list(range(slots))
        self._jobs: dict[str, RunningJob] = {}
        self._active: set[int] = set()
        self._frames: deque[HostCopy[Frame]] = deque()
        self._deliveries: deque[HostCopy[list[RunningJob]] | Closing] = deque()
        self._events: list[Event] = []
        """What no step has returned yet: one that runs out of memory keeps it for the next."""

    def capacity(self) -> int:
        """See Engine."""
        return len(self._free)

    def admit(self, job: Job) -> None:
        """See Engine."""
        speaking = RunningJob(job, min(self._free), self._parts.planner.plan(job))
        if job.reference is not None:
            speaking.reference = self._parts.references.request(job.reference)
        else:
            with torch.inference_mode():
                self._begin(speaking)
        self._free.remove(speaking.slot)
        self._jobs[job.id] = speaking

    def runnable(self, stalled: Collection[str]) -> bool:
        """See Engine."""
        if self._frames or self._deliveries or self._events:
            return True
        return any(
            speaking.prompt is not None
            or speaking.launchable
            or speaking.due
            or (speaking.ended and (speaking.speaks or _arrived(speaking)))
            for speaking in self._jobs.values()
            if speaking.job.id not in stalled
        )

    def step(self, stalled: Collection[str]) -> list[Event]:
        """See Engine. Whatever raises here can be repeated: each part is finished, or as if never begun."""
        jobs = [speaking for speaking in self._jobs.values() if speaking.job.id not in stalled]
        with torch.inference_mode():
            self._take_references(jobs)
            self._read_prompts(jobs)
            self._decode_due()
            launched = self._launch([speaking for speaking in jobs if speaking.launchable])
            while len(self._frames) > (1 if self._cuda and launched else 0):
                self._land(self._frames[0])
                self._frames.popleft()
            self._decode_due()
            self._deliver(behind=DELIVERIES_BEHIND if launched else 0)
        events, self._events = self._events, []
        return events

    def cancel(self, job_id: str) -> None:
        """See Engine."""
        speaking = self._jobs.get(job_id)
        if speaking is not None:
            self._release(speaking)
        self._events = [event for event in self._events if event.job_id != job_id]

    def offload(self) -> None:
        """See Engine."""
        self._settle()
        self._parts.runner.release()
        self._parts.vocoder.release()
        self._parts.prompts.clear_cache()
        self._parts.references.clear()
        self._parts.offloader.offload()

    def restore(self) -> None:
        """See Engine."""
        with torch.inference_mode():
            self._parts.offloader.restore()
            self._active.clear()
            self._parts.runner.prepare()
            self._parts.vocoder.prepare()

    def close(self) -> None:
        """See Engine."""
        for speaking in list(self._jobs.values()):
            self._release(speaking)
        self._settle()
        self._parts.references.close()
        self._parts.runner.close()
        self._parts.vocoder.release()
        self._parts.prompts.clear_cache()
        self._parts.offloader.close()

    def memory(self) -> Memory:
        """See Engine."""
        return self._parts.offloader.memory(references=self._parts.references.bytes)

    def _settle(self) -> None:
        """Forget what was begun for jobs since gone; when this returns the device works on none of it."""
        self._frames.clear()
        self._deliveries.clear()
        self._events.clear()
        if self._cuda:
            torch.cuda.synchronize()

    def _take_references(self, jobs: Iterable[RunningJob]) -> None:
        """Jobs whose recording is encoded begin; where that failed, they end, unless the device itself is broken.

        Where memory ran out, the step does as well, once: whoever called it makes room, and the next one asks again.
        """
        exhausted: BaseException | None = None
        for speaking in jobs:
            if not _arrived(speaking) or speaking.reference is None or speaking.job.reference is None:
                continue
            error = speaking.reference.exception()
            try:
                if error is not None and is_out_of_memory(error) and speaking.exhausted is None:
                    speaking.exhausted, exhausted = speaking.reference, error
                    continue
                if speaking.exhausted is speaking.reference:
                    speaking.reference = self._parts.references.request(speaking.job.reference)
                    continue
                if isinstance(error, Exception) and not is_broken_device(error):
                    raise error if isinstance(error, JobError) else _not_encoded(error)
                speaking.encoded = speaking.reference.result()
                self._begin(speaking)
            except JobError as failure:
                self._fail(speaking, failure)
        if exhausted is not None:
            raise exhausted

    def _begin(self, speaking: RunningJob) -> None:
        """Make the next utterance's prompt."""
        encoded, plan = speaking.encoded, speaking.plan
        voice = Voice(name=speaking.job.voice)
        if encoded is not None:
            voice = Voice(embedding=encoded.embedding, codes=encoded.codes, transcript=plan.transcript)
        speaking.begin(self._parts.planner.utterance(speaking.job, plan, speaking.text, voice, left=speaking.left))

    def _read_prompts(self, jobs: Iterable[RunningJob]) -> None:
        tokens = 0
        chosen: list[RunningJob] = []
        for speaking in jobs:
            if speaking.prompt is None or (chosen and tokens + speaking.length > PREFILL_TOKENS):
                continue
            tokens += speaking.length
            chosen.append(speaking)
        entries = []
        for speaking in chosen:
            if speaking.prompt is None:
                continue
            plan = speaking.plan
            randomness = uniforms(plan.seed, speaking.utterance, speaking.cap, self._parts.state.ring_buffer.shape[2])
            self._parts.state.write(
                speaking.slot, speaking.prompt, self._parts.prompts.padding(), plan.choice, randomness
            )
            self._parts.vocoder.begin(speaking.slot, speaking.encoded.primed if speaking.encoded else None)
            entries.append(PrefillInput(speaking.slot, speaking.prompt, plan.choice.full_vocab))
        if entries:
            self._parts.runner.prefill(entries)
        for speaking in chosen:
            speaking.start()

    def _launch(self, members: list[RunningJob]) -> bool:
        """Begin a frame for `members`; whether there was one."""
        if not members:
            return False
        self._activate({speaking.slot for speaking in members})
        rows = [(speaking.slot, speaking.length + speaking.launched + 1) for speaking in members]
        readback = HostCopy(
            self._parts.state.next_codebook0, Frame([(speaking, speaking.utterance) for speaking in members])
        )
        self._parts.vocoder.fence()
        self._parts.runner.decode_step(rows, full_vocab=any(speaking.plan.choice.full_vocab for speaking in members))
        readback.start()
        self._frames.append(readback)
        for speaking in members:
            speaking.launched += 1
        return True

    def _activate(self, slots: set[int]) -> None:
        if slots == self._active:
            return
        active = self._parts.state.active
        mask = torch.zeros(active.shape, dtype=torch.bool, pin_memory=self._cuda)
        mask[sorted(slots)] = True
        active.copy_(mask, non_blocking=True)
        self._active = slots

    def _land(self, readback: HostCopy[Frame]) -> None:
        """Take note of a frame: what was made is speech, and the code made with it tells whether more follows."""
        following = readback.wait().tolist()
        for speaking, utterance in readback.record.members:
            if speaking.alive and speaking.utterance == utterance and not speaking.ended:
                speaking.land(last=following[speaking.slot] == self._end)

    def _decode_due(self) -> None:
        due = [speaking for speaking in self._jobs.values() if speaking.due]
        for group in most_urgent_first(self._parts.vocoder.groups(due)):
            self._deliveries.append(self._parts.vocoder.decode(group))
            for speaking in group:
                speaking.take_chunk()
        for speaking in self._jobs.values():
            if speaking.speaks and speaking.ended and not speaking.pending:
                self._deliveries.append(Closing(speaking, final=speaking.finish()))

    def _deliver(self, behind: int) -> None:
        """Hand out what has arrived, in order; at most `behind` deliveries may stay under way."""
        while self._deliveries:
            head = self._deliveries[0]
            if isinstance(head, Closing):
                if head.speaking.alive:
                    self._close(head)
            else:
                if len(self._deliveries) <= behind and not head.ready():
                    return
                for speaking, samples in zip(head.record, head.wait().numpy(), strict=True):
                    self._hand_out(speaking, samples)
            self._deliveries.popleft()

    def _hand_out(self, speaking: RunningJob, samples: np.ndarray) -> None:
        if speaking.alive:
            speaking.hear(samples, FRAME_SAMPLES)
            self._emit(speaking, samples.tobytes())

    def _close(self, closing: Closing) -> None:
        """End the job, or begin its next utterance; what is handed out follows what may raise."""
        speaking = closing.speaking
        if closing.final:
            self._release(speaking)
            self._events.append(Done(speaking.job.id, speaking.reason, speaking.usage))
            return
        try:
            self._begin(speaking)
        except JobError as error:
            self._fail(speaking, error)
            return
        if self._pause:
            self._emit(speaking, self._pause)

    def _emit(self, speaking: RunningJob, pcm: bytes) -> None:
        speaking.plays(seconds_of(pcm), self._clock())
        self._events.append(Pcm(speaking.job.id, pcm))

    def _fail(self, speaking: RunningJob, error: JobError) -> None:
        self._release(speaking)
        self._events.append(Fault(speaking.job.id, error))

    def _release(self, speaking: RunningJob) -> None:
        speaking.alive = False
        if speaking.reference is not None and speaking.job.reference is not None:
            self._parts.references.give_up(speaking.job.reference.key, speaking.reference)
        del self._jobs[speaking.job.id]
        self._free.append(speaking.slot)


def _not_encoded(error: Exception) -> JobError:
    """What a job hears whose recording the encoders failed at: it is alone in that."""
    if is_out_of_memory(error):
        return JobError("insufficient_vram", f"memory ran out while ref_audio was encoded: {error}", retry_after_s=5)
    _log.error("a recording could not be encoded", exc_info=error)
    return JobError("synthesis_failed", f"ref_audio could not be encoded: {error}", param="ref_audio")


def _arrived(speaking: RunningJob) -> bool:
    """Whether the job's recording is encoded, or failed to be."""
    return speaking.reference is not None and speaking.utterance < 0 and speaking.reference.done()
