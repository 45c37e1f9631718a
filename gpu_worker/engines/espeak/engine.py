"""EspeakEngine: a process has one, because the state of espeak-ng is global.

A step synthesizes at most one clause of each job, and returns at most one chunk of each job.
A clause takes about a millisecond, and a long one up to 0.2 s: the step ends after MAX_STEP_S, and the next one begins
with the jobs that were not reached. So several jobs speak side by side, and a cancelled job ends before its next chunk.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Final

import numpy as np
import structlog

from gpu_worker.engines.base import (
    Done,
    EngineStats,
    Event,
    Fault,
    FinishReason,
    Job,
    JobError,
    Memory,
    Pcm,
)
from gpu_worker.engines.espeak.library import EspeakLibrary
from gpu_worker.engines.espeak.sequence import RunningJob
from gpu_worker.engines.fades import fade_out
from gpu_worker.engines.faults import is_out_of_memory
from shared.catalog import ModelSpec
from shared.pcm import BYTES_PER_SAMPLE, EMPTY_S, FRAME_SAMPLES, SAMPLE_RATE, bytes_for
from shared.protocol import CacheName, Usage
from shared.text import NO_SPEAKABLE_TEXT, is_speakable

SLOTS: Final = 32
"""Jobs at the same time. Each holds at most one clause of audio."""

CHUNK_S: Final = (0.1, 0.2, 0.4)
"""Length of a job's first, second, and every further chunk: an early first sound, then fewer messages."""

MAX_STEP_S: Final = 0.05
"""A step that has taken so long leaves the other jobs to the next one: a clause of 700 characters takes 0.2 s."""

log = structlog.get_logger(__name__)


class EspeakEngine:
    """The Engine protocol over espeak-ng. `spec` lists the voices and languages that jobs may name."""

    def __init__(self, spec: ModelSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec = spec
        self._clock = clock
        self._codes = {language.name: language.codes[0] for language in spec.languages}
        self._library = EspeakLibrary()
        self._sequences: dict[str, RunningJob] = {}
        self._parked: dict[str, RunningJob] = {}
        self._parked_bytes = 0
        self._batch_sizes: Counter[int] = Counter()

    def capacity(self) -> int:
        return SLOTS - len(self._sequences)

    def admit(self, job: Job) -> None:
        if not job.open and not is_speakable(job.text):
            raise JobError("invalid_value", NO_SPEAKABLE_TEXT, param="input")
        voice = self._voice_of(job)
        self._sequences[job.id] = RunningJob(job, voice, self._library.rate, _sentence_rules(voice))

    def append(self, job_id: str, text: str, *, flush: bool) -> None:
        sequence = self._find(job_id)
        if sequence is not None:
            sequence.append(text, flush=flush)

    def end_text(self, job_id: str) -> None:
        sequence = self._find(job_id)
        if sequence is not None:
            sequence.end_text()

    def waits_for_text(self, job_id: str) -> bool:
        sequence = self._find(job_id)
        return sequence is not None and sequence.waits

    def is_faster_alone(self) -> bool:
        return True

    def runnable(self, held_back: Collection[str]) -> bool:
        return any(job_id not in held_back and not sequence.waits for job_id, sequence in self._sequences.items())

    def step(self, held_back: Collection[str]) -> list[Event]:
        """Return at most one chunk of each job. Those that a long step did not reach come first in the next one."""
        events: list[Event] = []
        sequences = self._sequences.items()
        batch = [(name, sequence) for name, sequence in sequences if name not in held_back and not sequence.waits]
        reached, until = 0, self._clock() + MAX_STEP_S
        for job_id, sequence in batch:
            reached += 1
            self._sequences[job_id] = self._sequences.pop(job_id)
            try:
                events += self._advance(sequence)
            except JobError as error:
                events.append(self._fault(job_id, error))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                log.exception("job_failed", job_id=job_id)
                events.append(self._fault(job_id, JobError("synthesis_failed", f"espeak-ng failed: {error}")))
            if self._clock() >= until:
                break
        self._batch_sizes[reached] += 1
        return events

    def _fault(self, job_id: str, error: JobError) -> Fault:
        self.cancel(job_id)
        return Fault(job_id, error)

    def park(self, job_id: str) -> int:
        sequence = self._sequences.pop(job_id, None)
        if sequence is not None:
            self._parked[job_id] = sequence
            self._parked_bytes += len(sequence.pcm)
        return len(self._parked[job_id].pcm) if job_id in self._parked else 0

    def park_bytes(self, job_id: str) -> int:
        sequence = self._find(job_id)
        return len(sequence.pcm) if sequence is not None else 0

    def unpark(self, job_id: str) -> None:
        if job_id in self._parked:
            self._sequences[job_id] = self._pop_parked(job_id)

    def cancel(self, job_id: str) -> None:
        if job_id in self._parked:
            self._pop_parked(job_id)
        self._sequences.pop(job_id, None)

    def warm_up(self) -> None:
        """Do nothing: the first samples come after half a millisecond."""

    def offload(self) -> None:
        """Do nothing: espeak-ng holds a few megabytes of host RAM and no device memory."""

    def restore(self) -> None:
        """Do nothing, as `offload`."""

    def close(self) -> None:
        """Drop all jobs. The library stays loaded: its global state cannot be destroyed and created again safely."""
        for job_id in [*self._sequences, *self._parked]:
            self.cancel(job_id)

    def memory(self) -> Memory:
        """The audio of parked jobs. The few megabytes of espeak-ng count as the process's own."""
        return Memory(host={"parked": self._parked_bytes} if self._parked_bytes else {})

    def stats(self) -> EngineStats:
        return EngineStats(batch_sizes=dict(self._batch_sizes))

    def empty_cache(self, name: CacheName) -> None:
        """Do nothing: espeak-ng keeps nothing."""

    def _pop_parked(self, job_id: str) -> RunningJob:
        sequence = self._parked.pop(job_id)
        self._parked_bytes -= len(sequence.pcm)
        return sequence

    def _advance(self, sequence: RunningJob) -> list[Event]:
        chunk_bytes = bytes_for(CHUNK_S[min(sequence.chunks, len(CHUNK_S) - 1)])
        if len(sequence.pcm) < chunk_bytes and not sequence.text_done:
            sequence.synthesize_clause(self._library)
            if len(sequence.pcm) < chunk_bytes and not sequence.text_done:
                return []
        chunk, rate = sequence.take(chunk_bytes)
        if sequence.job.open and sequence.over and not sequence.speech_bytes and rate is None:
            self.cancel(sequence.job.id)
            silence = Pcm(sequence.job.id, chunk or bytes(bytes_for(EMPTY_S)), None)
            return [silence, Done(sequence.job.id, "empty", self._usage(sequence))]
        reason: FinishReason = "stop"
        if rate is not None:
            if sequence.max_bytes is not None and sequence.speech_bytes + len(chunk) > sequence.max_bytes:
                cut = np.frombuffer(chunk[: sequence.max_bytes - sequence.speech_bytes], dtype=np.int16)
                chunk, reason = fade_out(cut, SAMPLE_RATE).tobytes(), "length"
            sequence.chunks += 1
            sequence.speech_bytes += len(chunk)
        events: list[Event] = []
        if chunk:
            words, sequence.words = sequence.words, []
            events.append(Pcm(sequence.job.id, chunk, rate, words))
        if reason == "length" or sequence.over:
            self.cancel(sequence.job.id)
            events.append(Done(sequence.job.id, reason, self._usage(sequence)))
        return events

    def _usage(self, sequence: RunningJob) -> Usage:
        """espeak-ng has no tokens: the input counts in words, the output in frames of 80 ms."""
        frame_bytes = FRAME_SAMPLES * BYTES_PER_SAMPLE
        return Usage(input_tokens=sequence.input_words, output_tokens=-(-sequence.speech_bytes // frame_bytes))

    def _find(self, job_id: str) -> RunningJob | None:
        return self._sequences.get(job_id) or self._parked.get(job_id)

    def _voice_of(self, job: Job) -> str:
        """The voice's name for espeak-ng: a language, "+", and the variant that makes the voice.

        If the job's language is not that of the voice, the variant is combined with the job's language.
        """
        voice = self._spec.voice(job.voice)
        if voice is None:
            raise JobError("voice_not_found", f"espeak-ng has no voice {job.voice!r}", param="voice")
        if job.language in ("auto", voice.language):
            return voice.id
        _, _, variant = voice.id.partition("+")
        code = self._codes.get(job.language)
        if code is None:
            raise JobError("invalid_value", f"espeak-ng does not speak {job.language!r}", param="language")
        return f"{code}+{variant}"


def _sentence_rules(voice: str) -> str:
    """The code by which sentencex knows the language of a voice of espeak-ng."""
    language = voice.partition("+")[0].partition("-")[0]
    return "zh" if language in ("cmn", "yue") else language
