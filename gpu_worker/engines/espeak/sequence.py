"""One job inside the engine: the parts of its text that are not yet synthesized, and the audio not yet returned."""

from collections import deque
from typing import Any, Final, NamedTuple

import numpy as np
import soxr
from numpy.typing import NDArray

from gpu_worker.engines.base import PAUSE_CHUNK_BYTES, Job
from gpu_worker.engines.espeak.library import MAX_PIECE_CHARS, EspeakLibrary
from gpu_worker.engines.espeak.scripts import readable, voice_runs
from gpu_worker.engines.espeak.word_times import time_words
from gpu_worker.engines.fades import fade_at_silences
from gpu_worker.engines.sentences import sentences_of
from shared.composition import compose
from shared.pcm import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE, bytes_for
from shared.protocol import Word
from shared.text import is_speakable

_AUDIBLE: Final = 33
"""-60 dB of full scale: what is louder belongs to a word."""


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
        *sentences, rest = sentences_of(self._text + next_word, self._rules) or [""]
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


class RunningJob:
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
        if self.job.open:  # such a text comes as it was typed: of a decomposed é espeak-ng would speak both parts
            parts = [part._replace(text=compose(part.text)) for part in parts]
        self._parts.extend(part._replace(text=readable(part.text)) for part in parts)
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

    def synthesize_clause(self, library: EspeakLibrary) -> None:
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
