"""The Qwen3-TTS engine: `step` makes one 80 ms frame for every job, and returns the audio that is complete.

QwenEngine owns the slots and the order of work within a step. The arithmetic belongs to the model and the codec,
batches and captured functions to the ModelRunner, checks and prompts to the Planner, the frames on the device to
LaunchedFrames, the chunks in the vocoder to Deliveries.

On CUDA a step launches frame n + 1 before it reads the codes of frame n, so the device never waits for Python.
It does so as late as is safe, so the prompts of new jobs stand before frame n + 1. Audio is returned when it is done.
The frame that was launched behind the end of a job is dropped.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable
from typing import Final

import msgspec
import structlog
import torch
from torch import Tensor

from gpu_worker.engines.base import PAUSE_CHUNK_BYTES, Done, EngineStats, Event, Fault, Job, JobError, Memory, Pcm
from gpu_worker.engines.faults import is_broken_device, is_out_of_memory
from gpu_worker.engines.qwen.deliveries import MAX_PENDING, Deliveries
from gpu_worker.engines.qwen.launched_frames import LaunchedFrames
from gpu_worker.engines.qwen.model.kv_cache import KVCache
from gpu_worker.engines.qwen.model.prompt import PromptBuilder, Voice
from gpu_worker.engines.qwen.model.sampling import SamplingParams, uniforms
from gpu_worker.engines.qwen.model.slot_state import SlotState
from gpu_worker.engines.qwen.offload import WeightOffloader
from gpu_worker.engines.qwen.parking import ParkedJob, nbytes, rows_to_device, rows_to_host
from gpu_worker.engines.qwen.passages import OpenText, Passage, WholeText
from gpu_worker.engines.qwen.planner import Plan, Planner, Utterance
from gpu_worker.engines.qwen.reference_cache import ReferenceCache
from gpu_worker.engines.qwen.runner import ModelRunner, PrefillInput
from gpu_worker.engines.qwen.sequence import RunningJob
from gpu_worker.engines.qwen.vocoder import Vocoder
from shared.pcm import EMPTY_S, bytes_for, seconds_of
from shared.protocol import CacheName, Segment

MAX_PREFILL_TOKENS: Final = 1024
"""Prompt tokens of the prefills in one step (but at least one prompt), so that new jobs do not delay the others."""

POLL_S: Final = 1e-4
"""Pause between two looks at the device. Waiting for one event would miss another that comes first."""

MAX_WAIT_S: Final = 2e-3
"""The longest wait for the device in one step: other models want their steps, too."""

log = structlog.get_logger(__name__)


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of an engine. `slots`: jobs at the same time."""

    slots: int
    state: SlotState
    cache: KVCache
    runner: ModelRunner
    prompts: PromptBuilder
    planner: Planner
    vocoder: Vocoder
    reference_cache: ReferenceCache
    offloader: WeightOffloader


class QwenEngine:
    """The Engine protocol for one Qwen3-TTS model."""

    def __init__(
        self,
        parts: Parts,
        *,
        pause_s: float,
        run_ahead: bool,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        """`pause_s`: silence between the utterances of a job. `clock` returns seconds.

        `run_ahead`: launch a frame before the one before it is read, for a device that computes beside Python.
        `interrupted` returns True if a step should end early, because there is a command.
        """
        self._parts = parts
        self._clock = clock
        self._sleep = sleep
        self._interrupted = interrupted
        self._gap = bytes(bytes_for(pause_s))
        self._run_ahead = run_ahead
        self._cuda = parts.state.active.is_cuda
        self._free_slots = list(range(parts.slots))
        self._sequences: dict[str, RunningJob] = {}
        self._parked: dict[str, ParkedJob] = {}
        self._parked_bytes = 0
        self._codec_row_bytes = nbytes(parts.vocoder.state.rows(0))
        self._frames = LaunchedFrames(parts.state, parts.runner, parts.vocoder, clock)
        self._deliveries = Deliveries(parts.vocoder, cuda=self._cuda, interrupted=interrupted)
        self._events: list[Event] = []
        """Events that no step has returned yet: a step that runs out of memory leaves them for the next one."""

    def warm_up(self) -> None:
        """Make one frame on CUDA, and drop it."""
        if not self._cuda:
            return
        plan = Plan(
            passages=WholeText([Segment(text="a")], lambda text: [text]),
            longest_tokens=1,
            sampling=SamplingParams(greedy=False, temperature=1.0, top_k=1, top_p=1.0, repetition_penalty=1.0),
            seed=0,
            max_new_tokens=1,
            whole_text=False,
        )
        with torch.inference_mode():
            prompt = self._parts.prompts.build("a", Voice(), language="auto", instructions="", whole_text=False)
            sequence = RunningJob(Job(id="", task="CustomVoice", segments=[]), min(self._free_slots), plan)
            sequence.start_utterance(Utterance(prompt, tokens=1, max_frames=1))
            self._prefill([sequence])
            self._frames.launch([sequence])
            self._frames.read_oldest()
            self._parts.vocoder.decode([sequence]).wait()
        self._frames.reset_statistics()

    def capacity(self) -> int:
        return len(self._free_slots)

    def admit(self, job: Job) -> None:
        plan = self._parts.planner.plan(job)
        sequence = RunningJob(job, self._slot_for_newcomer(), plan)
        if job.reference is not None:
            sequence.reference = self._parts.reference_cache.request(job.reference)
        else:
            with torch.inference_mode():
                self._go_on(sequence)
        self._free_slots.remove(sequence.slot)
        self._sequences[job.id] = sequence

    def _slot_for_newcomer(self) -> int:
        """The lowest free slot. On a CPU it may be lower, as a job that has spoken moves for a newcomer.

        There a frame takes longer the higher the highest slot of its jobs, and a newcomer's first frame is its own.
        """
        slot = min(self._free_slots)
        lower = [one for one in self._sequences.values() if one.slot < slot and one.underrun_at > -math.inf]
        if self._cuda or not lower:
            return slot
        moved = min(lower, key=lambda one: one.slot)
        with torch.inference_mode():
            rows = self._rows(moved) if moved.generating else []
            self._free_slots.append(moved.slot)
            self._free_slots.remove(slot)
            moved.slot = slot
            for row, target in zip(rows, self._rows(moved) if rows else [], strict=True):
                target.copy_(row)
        return min(self._free_slots)

    def append(self, job_id: str, text: str, *, flush: bool) -> None:
        open_text = self._open_text(job_id)
        if open_text is not None:
            open_text.append(text, flush=flush)

    def end_text(self, job_id: str) -> None:
        open_text = self._open_text(job_id)
        if open_text is not None:
            open_text.end()

    def waits_for_text(self, job_id: str) -> bool:
        sequence = self._find(job_id)
        return sequence is not None and sequence.waits_for_text

    def is_faster_alone(self) -> bool:
        """On a GPU a frame of 64 jobs takes 1.15 times as long as one of a single job.

        To leave the others out made first audio no earlier there, on the clock of test_latency.py, and the ends of
        speeches a fifth later.
        """
        return not self._cuda

    def runnable(self, held_back: Collection[str]) -> bool:
        if self._frames or self._deliveries or self._events:
            return True
        return any(
            sequence.prompt is not None
            or sequence.pause_left
            or sequence.can_launch
            or sequence.chunk_due
            or (sequence.between and not sequence.waits_for_text)
            or (sequence.needs_text and (sequence.can_launch_early or sequence.has_new_text))
            or (sequence.ended and (sequence.generating or _reference_done(sequence)))
            for sequence in self._sequences.values()
            if sequence.job.id not in held_back
        )

    def step(self, held_back: Collection[str]) -> list[Event]:
        """After any exception the step can be repeated: each part is complete, or as if not begun."""
        sequences = [sequence for sequence in self._sequences.values() if sequence.job.id not in held_back]
        with torch.inference_mode():
            self._take_references(sequences)
            self._start_utterances(sequences)
            self._write_text(sequences)
            self._prefill(sequences)
            ahead = 0
            if self._deliveries.decode_due_chunks(sequences):
                members = [sequence for sequence in sequences if sequence.can_launch]
                early = [sequence for sequence in sequences if sequence.can_launch_early]
                if (members or early) and self._frames.launch_due():
                    self._frames.launch(members, early)
                ahead = 1 if self._run_ahead and members else 0
                self._wait_for_device(ahead)
                while len(self._frames) > ahead and (not self._cuda or self._frames.oldest_ready()):
                    self._frames.read_oldest()
                self._deliveries.decode_due_chunks(sequences)
            self._deliver(max_pending=MAX_PENDING if self._cuda or ahead else 0)
        self._emit_pauses(sequences)
        events, self._events = self._events, []
        return events

    def park(self, job_id: str) -> int:
        """Frames and chunks on their way are not waited for. The next steps count and deliver them:
        their records hold the job itself, and the slot that it had.
        """
        if job_id in self._parked:
            return self._parked[job_id].bytes
        sequence = self._sequences.get(job_id)
        if sequence is None:
            return 0
        vocoder = self._parts.vocoder
        with torch.inference_mode():
            vocoder.wait_for_decodes()
            if sequence.generating:
                parked = ParkedJob(sequence, rows_to_host(self._model_rows(sequence)), vocoder.park(sequence.slot))
            else:
                parked = ParkedJob(sequence, [], [])
        del self._sequences[job_id]
        self._free_slots.append(sequence.slot)
        self._parked[job_id] = parked
        self._parked_bytes += parked.bytes
        return parked.bytes

    def park_bytes(self, job_id: str) -> int:
        if job_id in self._parked:
            return self._parked[job_id].bytes
        sequence = self._sequences.get(job_id)
        if sequence is None or not sequence.generating:
            return 0
        tokens = sequence.prompt_tokens + sequence.frames_launched
        state_bytes = self._parts.state.row_bytes(frames=sequence.max_frames, trailing=sequence.trailing_tokens)
        return tokens * self._parts.cache.token_bytes + state_bytes + self._codec_row_bytes

    def unpark(self, job_id: str) -> None:
        parked = self._parked.get(job_id)
        if parked is None:
            return
        sequence = parked.sequence
        sequence.slot = min(self._free_slots)
        if parked.bytes:
            with torch.inference_mode():
                rows_to_device(parked.model_rows, self._model_rows(sequence))
                self._parts.vocoder.unpark(sequence.slot, parked.codec_rows)
        self._free_slots.remove(sequence.slot)
        self._sequences[job_id] = sequence
        del self._parked[job_id]
        self._parked_bytes -= parked.bytes

    def cancel(self, job_id: str) -> None:
        if job_id in self._sequences:
            self._release(self._sequences[job_id])
        elif job_id in self._parked:
            self._release(self._parked[job_id].sequence)
        self._events = [event for event in self._events if event.job_id != job_id]

    def offload(self) -> None:
        self._drop_launched_work()
        self._parts.runner.release()
        self._parts.vocoder.release()
        self._parts.prompts.clear_cache()
        self._parts.reference_cache.clear()
        self._parts.offloader.offload()

    def restore(self) -> None:
        with torch.inference_mode():
            self._parts.offloader.restore()
            self._frames.forget_active_slots()
            self._parts.runner.prepare()
            self._parts.vocoder.prepare()

    def close(self) -> None:
        for job_id in [*self._sequences, *self._parked]:
            self.cancel(job_id)
        self._drop_launched_work()
        self._parts.reference_cache.close()
        self._parts.runner.close()
        self._parts.vocoder.release()
        self._parts.prompts.clear_cache()
        self._parts.offloader.close()

    def memory(self) -> Memory:
        memory = self._parts.offloader.memory(references=self._parts.reference_cache.bytes)
        if self._parked_bytes:
            memory = msgspec.structs.replace(memory, host={**memory.host, "parked": self._parked_bytes})
        return memory

    def stats(self) -> EngineStats:
        return EngineStats(
            batch_sizes=dict(self._frames.batch_sizes),
            captured_steps=self._frames.steps[True],
            eager_steps=self._frames.steps[False],
            caches=[
                self._parts.reference_cache.stats(),
                *self._parts.prompts.cache_stats(),
                *([] if self._parts.runner.prefixes is None else [self._parts.runner.prefixes.stats()]),
            ],
        )

    def empty_cache(self, name: CacheName) -> None:
        match name:
            case "references":
                self._parts.reference_cache.empty()
            case "prompts":
                self._parts.prompts.clear_cache()
            case "tokens":
                self._parts.prompts.clear_tokens()
            case "prefixes":
                if self._parts.runner.prefixes is not None:
                    self._parts.runner.prefixes.clear()

    def _drop_launched_work(self) -> None:
        """Drop the frames and chunks of jobs that are gone, and wait until the device has finished them."""
        self._frames.clear()
        self._deliveries.clear()
        self._events.clear()
        if self._cuda:
            torch.cuda.synchronize()

    def _find(self, job_id: str) -> RunningJob | None:
        """The job, in a slot or parked."""
        if job_id in self._parked:
            return self._parked[job_id].sequence
        return self._sequences.get(job_id)

    def _open_text(self, job_id: str) -> OpenText | None:
        sequence = self._find(job_id)
        return None if sequence is None else sequence.plan.open_text

    def _rows(self, sequence: RunningJob) -> list[Tensor]:
        return [*self._model_rows(sequence), *self._parts.vocoder.state.rows(sequence.slot)]

    def _model_rows(self, sequence: RunningJob) -> list[Tensor]:
        """The rows of a job's utterance in its slot, without the codec stream: views whose lengths a copy knows."""
        tokens = sequence.prompt_tokens + sequence.frames_launched
        return [
            *self._parts.cache.rows(sequence.slot, tokens),
            *self._parts.state.rows(sequence.slot, frames=sequence.max_frames, trailing=sequence.trailing_tokens),
        ]

    def _take_references(self, sequences: Iterable[RunningJob]) -> None:
        """Let the jobs begin whose reference is encoded.

        A job whose reference could not be encoded fails, unless the device itself is broken. If the encoder ran out of
        memory, the step raises that error once, so that its caller can free memory. The next step tries again.
        """
        out_of_memory: BaseException | None = None
        for sequence in sequences:
            if not _reference_done(sequence) or sequence.reference is None or sequence.job.reference is None:
                continue
            error = sequence.reference.exception()
            try:
                if error is not None and is_out_of_memory(error) and sequence.oom_reference is None:
                    sequence.oom_reference, out_of_memory = sequence.reference, error
                    continue
                if sequence.oom_reference is sequence.reference:
                    sequence.reference = self._parts.reference_cache.request(sequence.job.reference)
                    continue
                if isinstance(error, Exception) and not is_broken_device(error):
                    raise error if isinstance(error, JobError) else _encoding_error(error)
                sequence.encoded = sequence.reference.result()
                sequence.between = True
                if sequence.plan.open_text is not None:
                    sequence.plan.open_text.min_ids = self._parts.planner.least_ids(self._voice_of(sequence))
            except JobError as failure:
                self._fail(sequence, failure)
        if out_of_memory is not None:
            raise out_of_memory

    def _start_utterances(self, sequences: Iterable[RunningJob]) -> None:
        """Continue the jobs that are between two utterances, unless they wait for text."""
        for sequence in sequences:
            if sequence.alive and sequence.between and not sequence.waits_for_text:
                try:
                    self._go_on(sequence)
                except JobError as error:
                    self._fail(sequence, error)

    def _write_text(self, sequences: Iterable[RunningJob]) -> None:
        """Write the text that came into the slots whose next frame needs it."""
        for sequence in sequences:
            open_text = sequence.plan.open_text
            if open_text is None or not sequence.alive or not sequence.needs_text:
                continue
            text = self._parts.planner.more_text(open_text, sequence.tokens)
            if open_text.error is not None:
                self._fail(sequence, open_text.error)
            elif text is not None:
                padding = self._parts.prompts.padding()
                self._parts.state.append_text(sequence.slot, sequence.trailing_tokens, text.rows, padding)
                sequence.on_text(text)

    def _go_on(self, sequence: RunningJob) -> None:
        """Start the job's next utterance or end the job. An open job waits if its text has not come yet.

        Events are added last, behind everything that may raise: then the job stays between two utterances.
        """
        sequence.between = True
        passage = sequence.look_ahead()
        if passage is None:
            if sequence.plan.open_text is not None and sequence.plan.open_text.error is not None:
                raise sequence.plan.open_text.error
            return
        if passage.text:
            is_first, rate = sequence.utterance < 0, sequence.rate
            self._start_utterance(sequence, passage)
            if self._gap and not is_first:
                self._emit(sequence, self._gap, rate)
            return
        sequence.between = False
        sequence.pause_left = passage.pause_bytes
        if sequence.utterance < 0:  # an open job without a word
            sequence.reason = "empty"
            sequence.pause_left = max(sequence.pause_left, bytes_for(EMPTY_S))
        if not sequence.pause_left:
            self._finish(sequence)

    def _voice_of(self, sequence: RunningJob) -> Voice:
        encoded = sequence.encoded
        if encoded is None:
            return Voice(name=sequence.job.voice)
        return Voice(embedding=encoded.embedding, codes=encoded.codes, transcript=sequence.plan.transcript)

    def _start_utterance(self, sequence: RunningJob, passage: Passage) -> None:
        """Build the prompt of the job's next utterance."""
        voice = self._voice_of(sequence)
        utterance = self._parts.planner.utterance(
            sequence.job, sequence.plan, passage, voice, frames_left=sequence.frames_left
        )
        sequence.start_utterance(utterance)

    def _prefill(self, sequences: Iterable[RunningJob]) -> None:
        """Read waiting prompts into their slots, up to MAX_PREFILL_TOKENS."""
        tokens = 0
        chosen: list[RunningJob] = []
        for sequence in sequences:
            if (
                sequence.prompt is None
                or sequence.pause_left
                or (chosen and tokens + sequence.prompt_tokens > MAX_PREFILL_TOKENS)
            ):
                continue
            tokens += sequence.prompt_tokens
            chosen.append(sequence)
        inputs = []
        for sequence in chosen:
            if sequence.prompt is None:
                continue
            plan, state = sequence.plan, self._parts.state
            randomness = uniforms(plan.seed, sequence.utterance, sequence.max_frames, state.ring_buffer.shape[2])
            state.write(sequence.slot, sequence.prompt, self._parts.prompts.padding(), plan.sampling, randomness)
            self._parts.vocoder.begin(sequence.slot, sequence.encoded.primed if sequence.encoded else None)
            inputs.append(PrefillInput(sequence.slot, sequence.prompt, plan.sampling.full_vocab))
        if inputs:
            self._parts.runner.prefill(inputs)
        for sequence in chosen:
            sequence.on_prefilled()

    def _wait_for_device(self, ahead: int) -> None:
        """Wait until a frame beyond `ahead` ones is ready, or the oldest chunk, or until a frame has to be launched."""
        until = self._clock() + MAX_WAIT_S
        while self._cuda and (self._frames or self._deliveries):
            if self._deliveries.oldest_ready():
                return
            if self._frames.oldest_ready() if len(self._frames) > ahead else ahead and self._frames.launch_due():
                return
            if self._interrupted() or self._clock() >= until:
                return
            self._sleep(POLL_S)

    def _deliver(self, max_pending: int) -> None:
        """Turn decoded chunks into events, in order. At most `max_pending` deliveries may stay unfinished."""
        while (delivery := self._deliveries.take(max_pending)) is not None:
            for sequence, pcm in delivery.chunks:
                self._emit(sequence, pcm, sequence.rate)
            if delivery.ended is not None:
                self._start_utterances([delivery.ended])

    def _emit_pauses(self, sequences: Iterable[RunningJob]) -> None:
        """Emit the next piece of each pause. A job whose last sound is a pause ends behind it.

        An utterance behind a pause has its prompt by now, and no frame.
        """
        for sequence in sequences:
            if not sequence.pause_left or not sequence.alive:
                continue
            size = min(sequence.pause_left, PAUSE_CHUNK_BYTES)
            sequence.pause_left -= size
            self._emit(sequence, bytes(size), None)
            if not sequence.pause_left and sequence.prompt is None:
                self._finish(sequence)

    def _emit(self, sequence: RunningJob, pcm: bytes, rate: float | None) -> None:
        sequence.on_delivered(seconds_of(pcm), self._clock())
        self._events.append(Pcm(sequence.job.id, pcm, rate))

    def _finish(self, sequence: RunningJob) -> None:
        self._release(sequence)
        self._events.append(Done(sequence.job.id, sequence.reason, sequence.usage))

    def _fail(self, sequence: RunningJob, error: JobError) -> None:
        self._release(sequence)
        self._events.append(Fault(sequence.job.id, error))

    def _release(self, sequence: RunningJob) -> None:
        sequence.alive = False
        if sequence.reference is not None and sequence.job.reference is not None:
            self._parts.reference_cache.abandon(sequence.job.reference.key, sequence.reference)
        parked = self._parked.pop(sequence.job.id, None)
        if parked is None:
            del self._sequences[sequence.job.id]
            self._free_slots.append(sequence.slot)
        else:
            self._parked_bytes -= parked.bytes


def _encoding_error(error: Exception) -> JobError:
    """The error of a job whose reference could not be encoded."""
    if is_out_of_memory(error):
        return JobError("insufficient_vram", f"memory ran out while ref_audio was encoded: {error}", retry_after_s=5)
    log.error("reference_encoding_failed", exc_info=error)
    return JobError("synthesis_failed", f"ref_audio could not be encoded: {error}", param="ref_audio")


def _reference_done(sequence: RunningJob) -> bool:
    """True if the job waits for a reference whose encoding has succeeded or failed."""
    return sequence.reference is not None and sequence.encoded is None and sequence.reference.done()
