"""The checks of a recording before a voice is cloned from it, or saved to be cloned from later; and of new names.

No files, no encoders, no torch. The limits of length are in `shared.recordings`.
"""

import unicodedata
from collections.abc import Iterable
from typing import Final

import numpy as np

from gpu_worker.engines.base import JobError
from shared.pcm import seconds_of
from shared.protocol import VoiceAccess
from shared.recordings import length_problem, silence_problem, transcript_problem
from shared.settings import variable_of
from shared.text import is_printable
from shared.voice_access import OwnedVoice, folded, is_visible

SILENCE_RMS: Final = 1e-3
"""-60 dB of full scale: a quieter recording holds no voice."""


MAX_NAME_CHARS: Final = 64
"""Characters of the name of a voice or a consent."""


def checked_name(name: str, owner: str) -> str:
    """`name` in the form in which a new `owner` would get it; JobError `invalid_value` if it cannot be shown."""
    name = unicodedata.normalize("NFC", name).strip()
    if len(name) > MAX_NAME_CHARS or not is_printable(name):
        problem = f"a {owner}'s name has 1 to {MAX_NAME_CHARS} printable characters"
        raise JobError("invalid_value", problem, param="name")
    return name


class OutdatedError(JobError):
    """A JobError by the list alone: another process may have changed the folder since its last scan."""


def no_room(kind: str, count: int, most: int) -> OutdatedError:
    """The error for one more of `kind` where `count` of them are kept, and no more than `most` may be."""
    setting = variable_of("max_voices")
    if most == 0:
        return OutdatedError("invalid_value", f"this server keeps no {kind} ({setting}=0)", param="name")
    problem = f"there are {count} {kind} already and no more may be kept ({setting}={most}); delete one first"
    return OutdatedError("invalid_value", problem, param="name")


def name_taken(name: str, kind: type[JobError] = JobError) -> JobError:
    """The error of a voice whose name another saved voice has."""
    return kind("invalid_value", f"there is a saved voice {name!r} already; choose another name", param="name")


def is_name_taken(name: str, owner: str, voices: Iterable[OwnedVoice], but: str) -> bool:
    """True if `owner` sees another voice than the one with the id `but` that answers to `name`."""
    seen = [voice for voice in voices if voice.id != but and is_visible(voice, VoiceAccess(owner=owner))]
    return folded(name) in {folded(taken) for voice in seen for taken in (voice.id, voice.name)}


def check_recording(pcm: bytes, param: str) -> None:
    """Raise JobError `invalid_audio` on the field `param` if no voice can be cloned from 24 kHz mono int16 `pcm`."""
    try:
        problem = length_problem(seconds_of(pcm))
    except ValueError as error:
        raise JobError("invalid_audio", str(error), param=param) from error
    if problem is None:
        wave = np.frombuffer(pcm, dtype="<i2").astype(np.float32)
        if np.sqrt(np.dot(wave, wave) / len(wave)) < SILENCE_RMS * 2**15:
            problem = silence_problem(seconds_of(pcm))
    if problem is not None:
        raise JobError("invalid_audio", problem, param=param)


def check_transcript(text: str, pcm: bytes) -> None:
    """Raise JobError `invalid_value` on `ref_text` if `text` is too long to be said in `pcm`."""
    problem = transcript_problem(text, seconds_of(pcm))
    if problem is not None:
        raise JobError("invalid_value", problem, param="ref_text")
