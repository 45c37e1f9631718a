"""The embedded default engine: espeak-ng through ctypes. Real speech on any CPU, nothing to download.

It comes with an optional extra (GPL-3), so this module is imported only where that is installed (see `registry`).

espeak-ng keeps one global state, so one engine exists in a process and every call comes from one thread at a time.
A step synthesizes at most one clause of each job (about a millisecond) and hands out at most one chunk of it;
several jobs therefore speak side by side, and a cancelled one is gone before its next chunk.
"""

import ctypes
from collections.abc import Collection
from typing import Any, Final

import espeakng_loader
import numpy as np
import soxr

from gpu_worker.engines.base import Done, Event, Fault, FinishReason, Job, JobError, Memory, Pcm, Usage
from shared.catalog import ModelSpec
from shared.pcm import BYTES_PER_SAMPLE, FRAME_SAMPLES, SAMPLE_RATE, bytes_for
from shared.speakable import NO_SPEAKABLE_TEXT, is_speakable

SLOTS: Final = 32
"""Jobs side by side; each holds no more than one clause of audio."""

CHUNK_S: Final = (0.1, 0.2, 0.4)
"""Seconds of a job's first, second, and every further chunk: early first sound, then fewer messages."""

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS: Final = 2
_INITIALIZE_DONT_EXIT: Final = 0x8000
_CHARS_UTF8: Final = 1
_POS_CHARACTER: Final = 1
_EVENT_LIST_TERMINATED: Final = 0
_EVENT_END: Final = 5
_PARAMETER_RATE: Final = 1

_BUFFER_MS: Final = 100
_WORDS_A_MINUTE: Final = 155
MAX_PIECE_CHARS: Final = 1_000
"""What espeak-ng is given at once; it ends a clause long before (at about 720 characters without punctuation)."""


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


class _Library:
    """libespeak-ng, loaded and initialized; it clears its own throat between two clauses."""

    def __init__(self) -> None:
        self._lib: Any = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        data = str(espeakng_loader.get_data_path()).encode()
        self._lib.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self.rate = self._lib.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MS, data, _INITIALIZE_DONT_EXIT)
        if self.rate <= 0:
            raise JobError("model_unavailable", "espeak-ng could not be initialized; its data files may be damaged")
        self._heard = bytearray()
        self._position = 0
        self._callback = _Callback(self._on_audio)

    def clause(self, voice: str, text: str) -> tuple[bytes, int]:
        """The first clause of `text` as int16 PCM at `rate`, and how many characters of `text` it took.

        `text` is at most MAX_PIECE_CHARS long.
        The same text never sounds quite the same, since espeak-ng begins where its oscillators were;
        its length varies by up to 30 ms.
        Raises JobError where espeak-ng does not know the voice (it would otherwise keep the one before).
        """
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise JobError("voice_not_found", f"espeak-ng has no voice {voice!r}", param="voice")
        # Some voices bring a pace of their own, which the next one keeps (up to 30 % slower) unless it is set again.
        self._lib.espeak_SetParameter(_PARAMETER_RATE, _WORDS_A_MINUTE, 0)
        self._heard.clear()
        self._position = 0
        data = text.encode("utf-8", "replace")
        # Set each time: another engine, closed since, may have left its own, which is no longer there to be called.
        self._lib.espeak_SetSynthCallback(self._callback)
        failed = self._lib.espeak_Synth(data, len(data) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        if failed:
            raise JobError("synthesis_failed", f"espeak-ng answered with error {failed}")
        return bytes(self._heard), self._position if 0 < self._position < len(text) else len(text)

    def _on_audio(self, samples: Any, count: int, events: Any) -> int:
        """Called by espeak-ng for every 100 ms; 1 ends the synthesis, which happens once a clause has ended."""
        if count:
            self._heard += ctypes.string_at(samples, count * BYTES_PER_SAMPLE)
        index = 0
        while events[index].type != _EVENT_LIST_TERMINATED:
            if events[index].type == _EVENT_END:
                self._position = events[index].text_position
                # What follows in the last buffer is its filling, up to 100 ms of nothing.
                del self._heard[events[index].sample * BYTES_PER_SAMPLE :]
                return 1
            index += 1
        return 0


class _Speaking:
    """One job: the text still to be said, and the audio made but not yet handed out."""

    def __init__(self, job: Job, voice: str, rate: int) -> None:
        self.job = job
        self.voice = voice
        self._text = job.text.replace("\0", " ")
        self._said_chars = 0
        self.ready = bytearray()
        self.chunks = 0
        self.bytes_out = 0
        self._resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="int16")

    @property
    def limit(self) -> int | None:
        """The cap on bytes of audio that the job asked for (`max_new_tokens` frames of 80 ms)."""
        frames = self.job.sampling.max_new_tokens
        return None if frames is None else frames * FRAME_SAMPLES * BYTES_PER_SAMPLE

    @property
    def said(self) -> bool:
        """Whether the whole text has been synthesized."""
        return self._said_chars >= len(self._text)

    def say_clause(self, library: _Library) -> None:
        """Let `library` say the next clause of the text."""
        piece = self._text[self._said_chars : self._said_chars + MAX_PIECE_CHARS]
        pcm, taken = library.clause(self.voice, piece)
        self._said_chars += taken
        resampled = self._resampler.resample_chunk(np.frombuffer(pcm, dtype=np.int16), last=self.said)
        self.ready += resampled.astype("<i2").tobytes()


class EspeakEngine:
    """The Engine protocol over espeak-ng; `spec` says which voices and languages it may be asked for."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._codes = {language.name: language.codes[0] for language in spec.languages}
        self._library = _Library()
        self._speaking: dict[str, _Speaking] = {}

    def capacity(self) -> int:
        """How many more jobs `admit` takes now."""
        return SLOTS - len(self._speaking)

    def admit(self, job: Job) -> None:
        """Take a job; JobError where there is nothing in its text that could be said."""
        if not is_speakable(job.text):
            raise JobError("invalid_value", NO_SPEAKABLE_TEXT, param="input")
        self._speaking[job.id] = _Speaking(job, self._voice_of(job), self._library.rate)

    def runnable(self, stalled: Collection[str]) -> bool:
        """Whether any job may go on."""
        return any(job_id not in stalled for job_id in self._speaking)

    def step(self, stalled: Collection[str]) -> list[Event]:
        """One chunk for every job that may go on."""
        events: list[Event] = []
        for job_id, speaking in list(self._speaking.items()):
            if job_id in stalled:
                continue
            try:
                events += self._advance(speaking)
            except JobError as error:
                self.cancel(job_id)
                events.append(Fault(job_id, error))
        return events

    def cancel(self, job_id: str) -> None:
        """Forget a job; what it had not handed out is never heard."""
        self._speaking.pop(job_id, None)

    def offload(self) -> None:
        """Nothing to move: espeak-ng holds a few megabytes of host RAM and no device memory."""

    def restore(self) -> None:
        """Nothing was moved."""

    def close(self) -> None:
        """Forget all jobs. The library stays loaded: its global state cannot be torn down and set up again safely."""
        self._speaking.clear()

    def memory(self) -> Memory:
        """espeak-ng's few megabytes are part of the process and too small to be accounted for."""
        return Memory()

    def _advance(self, speaking: _Speaking) -> list[Event]:
        wanted = bytes_for(CHUNK_S[min(speaking.chunks, len(CHUNK_S) - 1)])
        if len(speaking.ready) < wanted and not speaking.said:
            speaking.say_clause(self._library)
            if len(speaking.ready) < wanted and not speaking.said:
                return []
        chunk = bytes(speaking.ready[:wanted])
        del speaking.ready[:wanted]
        reason: FinishReason = "stop"
        if speaking.limit is not None and speaking.bytes_out + len(chunk) > speaking.limit:
            chunk, reason = chunk[: speaking.limit - speaking.bytes_out], "length"
        speaking.chunks += 1
        speaking.bytes_out += len(chunk)
        events: list[Event] = [Pcm(speaking.job.id, chunk)] if chunk else []
        if reason == "length" or (speaking.said and not speaking.ready):
            self.cancel(speaking.job.id)
            events.append(Done(speaking.job.id, reason, self._usage(speaking)))
        return events

    def _usage(self, speaking: _Speaking) -> Usage:
        """espeak-ng has no tokens: words are counted in, and frames of 80 ms out."""
        frame_bytes = FRAME_SAMPLES * BYTES_PER_SAMPLE
        return Usage(input_tokens=len(speaking.job.text.split()), output_tokens=-(-speaking.bytes_out // frame_bytes))

    def _voice_of(self, job: Job) -> str:
        """espeak-ng's name of the voice; another language than the voice's own keeps the variant that makes it."""
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
