"""The embedded default engine: espeak-ng through ctypes. Real speech on any CPU, nothing to download.

espeak-ng is an optional extra (GPL-3): `engines.factory` imports this module only if the extra is installed.

The state of espeak-ng is global, so a process has one engine, and one thread at a time may call it.
A step synthesizes at most one clause of each job (about a millisecond) and returns at most one chunk of each job.
So several jobs speak side by side, and a cancelled job ends before its next chunk.
"""

import ctypes
from collections import Counter, deque
from collections.abc import Collection
from typing import Any, Final, NamedTuple

import espeakng_loader
import numpy as np
import sentencex
import soxr
from numpy.typing import NDArray

from gpu_worker.engines.base import (
    PAUSE_CHUNK_BYTES,
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
from gpu_worker.engines.fades import fade_at_silences, fade_out
from gpu_worker.engines.scripts import voice_runs
from gpu_worker.engines.word_times import time_words
from shared.catalog import ModelSpec
from shared.pcm import BYTES_PER_SAMPLE, EMPTY_S, FRAME_SAMPLES, SAMPLE_RATE, bytes_for
from shared.protocol import CacheName, Usage, Word
from shared.text import NO_SPEAKABLE_TEXT, is_speakable

SLOTS: Final = 32
"""Jobs at the same time. Each holds at most one clause of audio."""

CHUNK_S: Final = (0.1, 0.2, 0.4)
"""Length of a job's first, second, and every further chunk: an early first sound, then fewer messages."""

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS: Final = 2
_INITIALIZE_DONT_EXIT: Final = 0x8000
_CHARS_UTF8: Final = 1
_POS_CHARACTER: Final = 1
_EVENT_LIST_TERMINATED: Final = 0
_EVENT_WORD: Final = 1
_EVENT_END: Final = 5
_PARAMETER_RATE: Final = 1

_AUDIBLE: Final = 33
"""-60 dB of full scale: what is louder belongs to a word."""

_BUFFER_MS: Final = 100
_WORDS_PER_MINUTE: Final = 155
MAX_PIECE_CHARS: Final = 1_000
"""Characters per call of espeak-ng. A clause is shorter: even without punctuation it ends at about 720 characters."""


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class _Clause(NamedTuple):
    """A clause as int16 PCM at the library's rate, the number of its characters, and what was said when in it."""

    pcm: bytes
    chars: int
    reports: list[tuple[int, int]]


class _Library:
    """libespeak-ng, loaded and initialized. It synthesizes one clause at a time."""

    def __init__(self) -> None:
        self._lib: Any = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        data = str(espeakng_loader.get_data_path()).encode()
        self._lib.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self.rate = self._lib.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MS, data, _INITIALIZE_DONT_EXIT)
        if self.rate <= 0:
            raise JobError("model_unavailable", "espeak-ng could not be initialized; its data files may be damaged")
        self._pcm = bytearray()
        self._clause_end = 0
        self._reports: list[tuple[int, int]] = []
        self._callback = _Callback(self._on_audio)

    def synthesize_clause(self, voice: str, text: str) -> _Clause:
        """The first clause of `text`, with PCM at `rate`. Its reports are for word_times.py.

        `text` has at most MAX_PIECE_CHARS characters.
        The same text never sounds exactly the same, because espeak-ng continues from the state of its oscillators;
        the length varies by up to 30 ms.

        Raises:
            JobError: `voice_not_found`: espeak-ng does not know the voice (it would keep the previous one);
                `synthesis_failed`: espeak-ng returned an error.
        """
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise JobError("voice_not_found", f"espeak-ng has no voice {voice!r}", param="voice")
        # Some voices set a pace of their own (up to 30 % slower), and the next voice keeps it unless it is set again.
        self._lib.espeak_SetParameter(_PARAMETER_RATE, _WORDS_PER_MINUTE, 0)
        self._pcm.clear()
        self._clause_end = 0
        self._reports = []
        data = text.encode("utf-8", "replace")
        # Set it each time: a closed engine may have left its own callback, which no longer exists.
        self._lib.espeak_SetSynthCallback(self._callback)
        failed = self._lib.espeak_Synth(data, len(data) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        if failed:
            raise JobError("synthesis_failed", f"espeak-ng answered with error {failed}")
        chars = self._clause_end if 0 < self._clause_end < len(text) else len(text)
        return _Clause(bytes(self._pcm), chars, self._reports)

    def _on_audio(self, samples: Any, count: int, events: Any) -> int:
        """espeak-ng calls this for every 100 ms of audio. Returning 1 ends the synthesis: at the end of a clause."""
        if count:
            self._pcm += ctypes.string_at(samples, count * BYTES_PER_SAMPLE)
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            if events[index].type == _EVENT_WORD:
                self._reports.append((events[index].text_position - 1, events[index].sample))
            if events[index].type == _EVENT_END:
                self._clause_end = events[index].text_position
                # The rest of the last buffer is padding: up to 100 ms of silence.
                del self._pcm[events[index].sample * BYTES_PER_SAMPLE :]
                return 1
            index += 1
        return 0


class _Part(NamedTuple):
    """Text that is spoken in one go: a segment, or a sentence of an open one, which begins at `first_char` of it."""

    text: str
    segment: int
    first_char: int
    rate: float
    pause_ms: int


class _OpenSegment:
    """The last segment of an open job, divided into sentences as its text comes.

    A sentence is held back until the next one has begun. It is spoken by itself, so nothing later can change it.
    """

    def __init__(self, first: _Part, rules: str) -> None:
        """`rules`: sentencex's code of the language."""
        self._part = first._replace(text="")
        self._text = first.text
        self._rules = rules
        self._is_speakable = False

    def append(self, text: str) -> list[_Part]:
        """Add text; returns the sentences that it completes."""
        self._text += text
        self._is_speakable = self._is_speakable or is_speakable(self._text)
        if not self._is_speakable:
            return []
        # Behind white space, the letter shows whether the next sentence can begin there.
        next_word = "A" if self._text[-1:].isspace() else ""
        *sentences, rest = sentencex.segment(self._rules, self._text + next_word) or [""]
        self._text = rest.removesuffix(next_word)
        return [self._next(sentence) for sentence in sentences]

    def end(self) -> _Part:
        """The rest of the segment, with the pause behind it. Text behind it is of another segment."""
        rest = self._part._replace(text=self._text if self._is_speakable else "")
        self._part = rest._replace(text="", segment=rest.segment + 1, first_char=0, pause_ms=0)
        self._text, self._is_speakable = "", False
        return rest

    def _next(self, text: str) -> _Part:
        part = self._part._replace(text=text, pause_ms=0)
        self._part = self._part._replace(first_char=self._part.first_char + len(text))
        return part


class _RunningJob:
    """The state of one job: the parts not yet synthesized, and the audio not yet returned by a step.

    `pcm` is audio of the current part alone, and `pause_left` the bytes of the pause behind that part.
    `over`: all of it is said. `waits`: all that there is of an open job is said, and more may come.
    """

    def __init__(self, job: Job, voice: str, rate: int, rules: str) -> None:
        """`rules`: the code of the language by whose rules sentencex divides the text of an open job."""
        self.job = job
        self.voice = voice
        self.pcm = bytearray()
        self.pause_left = 0
        self.chunks = 0
        self.speech_bytes = 0
        self.words: list[Word] = []
        self.input_words = 0
        self._taken_bytes = self._synthesized_chars = self._synthesized_samples = self._run_end = 0
        self._source_rate = rate
        self._resampler: Any = None
        self._text = ""
        self._parts: deque[_Part] = deque()
        self._open: _OpenSegment | None = None
        parts = [
            _Part(segment.text.replace("\0", " "), number, 0, segment.rate, segment.pause_ms)
            for number, segment in enumerate(job.segments)
        ]
        if job.open:
            self._open = _OpenSegment(parts.pop() if parts else _Part("", 0, 0, 1.0, 0), rules)
            parts += self._open.append("")
        self.waits = True
        self._add(parts)

    def append(self, text: str, *, flush: bool) -> None:
        """Add text to an open job."""
        if self._open is not None:
            parts = self._open.append(text.replace("\0", " "))
            self._add([*parts, self._open.end()] if flush else parts)

    def end_text(self) -> None:
        """The text of an open job is complete."""
        if self._open is not None:
            rest = self._open.end()
            self._open = None
            self._add([rest])

    def _add(self, parts: list[_Part]) -> None:
        self.input_words += sum(len(part.text.split()) for part in parts)
        self._parts.extend(parts)
        if self.waits:
            self._next_part()

    @property
    def max_bytes(self) -> int | None:
        """The job's limit on bytes of speech (`max_new_tokens` frames of 80 ms); None if it has no limit."""
        frames = self.job.sampling.max_new_tokens
        return None if frames is None else frames * FRAME_SAMPLES * BYTES_PER_SAMPLE

    @property
    def text_done(self) -> bool:
        """True if the whole text of the part has been synthesized."""
        return self._synthesized_chars >= len(self._text)

    def synthesize_clause(self, library: _Library) -> None:
        """Append the audio of the next clause to `pcm`, or of its part for one voice."""
        start = self._synthesized_chars
        if start >= self._run_end:
            self._run_end, self._run_voice = next(self._runs)
        piece = self._text[start : min(start + MAX_PIECE_CHARS, self._run_end)]
        clause = library.synthesize_clause(self._run_voice, piece)
        # espeak-ng stops some sounds at once where a pause begins, and begins a text at any point of a wave.
        samples = fade_at_silences(np.frombuffer(clause.pcm, dtype=np.int16), library.rate)
        if self.job.timestamps:
            self._time_words(piece[: clause.chars], clause.reports, samples)
        self._synthesized_chars += clause.chars
        self._synthesized_samples += len(samples)
        resampled = self._resampler.resample_chunk(samples, last=self.text_done)
        self.pcm += resampled.astype("<i2").tobytes()

    def _time_words(self, text: str, reports: list[tuple[int, int]], samples: NDArray[np.int16]) -> None:
        """Append the words of a clause to `words`. Behind its last word, a clause is silent."""
        heard = np.flatnonzero(np.abs(samples.astype(np.int32)) > _AUDIBLE)
        end = int(heard[-1]) + 1 if heard.size else len(samples)
        first_char = self._part.first_char + self._synthesized_chars
        for word in time_words(text, reports, end):
            start_s, end_s = (
                self._part_start_s + (self._synthesized_samples + sample) / self._source_rate
                for sample in (word.start_sample, word.end_sample)
            )
            self.words.append(Word(self._part.segment, first_char + word.start, first_char + word.end, start_s, end_s))

    def take(self, size: int) -> tuple[bytes, float | None]:
        """The next `size` bytes at most and their rate: speech of the part, or else a piece of the pause behind it.

        Behind the last of them the next part is the current one, or the job is over, or it waits.
        """
        if self.pcm:
            taken, rate = bytes(self.pcm[:size]), self.rate
            del self.pcm[:size]
        else:
            taken, rate = bytes(min(self.pause_left, PAUSE_CHUNK_BYTES)), None
            self.pause_left -= len(taken)
        self._taken_bytes += len(taken)
        if self.text_done and not self.pcm and not self.pause_left:
            self._next_part()
        return taken, rate

    def _next_part(self) -> None:
        self.over = self.waits = False
        if not self._parts:
            self.waits = self._open is not None
            self.over = not self.waits
            return
        self._part = self._parts.popleft()
        self._text = self._part.text
        self._part_start_s = self._taken_bytes / bytes_for(1.0)
        self._synthesized_chars = 0
        self._runs = voice_runs(self._text, self.voice)
        self._run_end = 0
        self._run_voice = self.voice
        self._synthesized_samples = 0
        self.rate: float | None = self._part.rate
        self.pause_left = bytes_for(self._part.pause_ms / 1000)
        self._resampler = soxr.ResampleStream(self._source_rate, SAMPLE_RATE, 1, dtype="int16")


class EspeakEngine:
    """The Engine protocol over espeak-ng. `spec` lists the voices and languages that jobs may name."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._codes = {language.name: language.codes[0] for language in spec.languages}
        self._library = _Library()
        self._sequences: dict[str, _RunningJob] = {}
        self._parked: dict[str, _RunningJob] = {}
        self._parked_bytes = 0
        self._batch_sizes: Counter[int] = Counter()

    def capacity(self) -> int:
        return SLOTS - len(self._sequences)

    def admit(self, job: Job) -> None:
        if not job.open and not is_speakable(job.text):
            raise JobError("invalid_value", NO_SPEAKABLE_TEXT, param="input")
        voice = self._voice_of(job)
        self._sequences[job.id] = _RunningJob(job, voice, self._library.rate, _sentence_rules(voice))

    def append(self, job_id: str, text: str, *, flush: bool) -> None:
        sequence = self._sequences.get(job_id) or self._parked.get(job_id)
        if sequence is not None:
            sequence.append(text, flush=flush)

    def end_text(self, job_id: str) -> None:
        sequence = self._sequences.get(job_id) or self._parked.get(job_id)
        if sequence is not None:
            sequence.end_text()

    def waits_for_text(self, job_id: str) -> bool:
        sequence = self._sequences.get(job_id) or self._parked.get(job_id)
        return sequence is not None and sequence.waits

    def is_faster_alone(self) -> bool:
        return True

    def runnable(self, held_back: Collection[str]) -> bool:
        return any(job_id not in held_back and not sequence.waits for job_id, sequence in self._sequences.items())

    def step(self, held_back: Collection[str]) -> list[Event]:
        """Return at most one chunk of each job."""
        events: list[Event] = []
        sequences = self._sequences.items()
        batch = [(name, sequence) for name, sequence in sequences if name not in held_back and not sequence.waits]
        self._batch_sizes[len(batch)] += 1
        for job_id, sequence in batch:
            try:
                events += self._advance(sequence)
            except JobError as error:
                self.cancel(job_id)
                events.append(Fault(job_id, error))
        return events

    def park(self, job_id: str) -> int:
        sequence = self._sequences.pop(job_id, None)
        if sequence is not None:
            self._parked[job_id] = sequence
            self._parked_bytes += len(sequence.pcm)
        return len(self._parked[job_id].pcm) if job_id in self._parked else 0

    def park_bytes(self, job_id: str) -> int:
        sequence = self._sequences.get(job_id) or self._parked.get(job_id)
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

    def _pop_parked(self, job_id: str) -> _RunningJob:
        sequence = self._parked.pop(job_id)
        self._parked_bytes -= len(sequence.pcm)
        return sequence

    def _advance(self, sequence: _RunningJob) -> list[Event]:
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

    def _usage(self, sequence: _RunningJob) -> Usage:
        """espeak-ng has no tokens: the input counts in words, the output in frames of 80 ms."""
        frame_bytes = FRAME_SAMPLES * BYTES_PER_SAMPLE
        return Usage(input_tokens=sequence.input_words, output_tokens=-(-sequence.speech_bytes // frame_bytes))

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
