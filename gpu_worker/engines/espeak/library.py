"""libespeak-ng through ctypes: one clause of text to PCM.

The state of espeak-ng is global, so one thread at a time may call it.
"""

import ctypes
from typing import Any, Final, NamedTuple

import espeakng_loader

from gpu_worker.engines.base import JobError
from shared.pcm import BYTES_PER_SAMPLE

# From espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS: Final = 2
_INITIALIZE_DONT_EXIT: Final = 0x8000
_CHARS_UTF8: Final = 1
_POS_CHARACTER: Final = 1
_EVENT_LIST_TERMINATED: Final = 0
_EVENT_WORD: Final = 1
_EVENT_END: Final = 5
_PARAMETER_RATE: Final = 1

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


class Clause(NamedTuple):
    """A clause as int16 PCM at the library's rate, the number of its characters, and what was said when in it."""

    pcm: bytes
    chars: int
    reports: list[tuple[int, int]]


class EspeakLibrary:
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

    def synthesize_clause(self, voice: str, text: str) -> Clause:
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
        return Clause(bytes(self._pcm), chars, self._reports)

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
