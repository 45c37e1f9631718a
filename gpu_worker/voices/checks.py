"""What a recording must be for a voice to be cloned from it: one answer for who keeps it and who speaks like it.

It knows neither files nor encoders, and no torch.
"""

from typing import Final

import numpy as np

from gpu_worker.engines.base import JobError
from shared.pcm import samples_of, seconds_of

SHORTEST_S: Final = 0.5
LONGEST_S: Final = 60.0
"""A minute is 750 positions of a Qwen3-TTS slot's cache."""

SILENCE_RMS: Final = 1e-3
"""-60 dB of full scale: nothing in such a recording is a voice."""

TEXT_BYTES: Final = 200
TEXT_BYTES_A_SECOND: Final = 60
"""UTF-8 that may be said in a recording, and a margin: the fastest speakers say 25 letters a second,

in the scripts that take most 15 of 3 bytes each. What is longer is no transcript, and leaves no room to speak.
"""


def check_recording(pcm: bytes, param: str) -> None:
    """Refuse 24 kHz mono int16 that no voice can be cloned from.

    Raises:
        JobError: `invalid_audio` on the field `param`, saying what is wrong.
    """
    try:
        samples_of(pcm)
    except ValueError as error:
        raise JobError("invalid_audio", str(error), param=param) from error
    seconds = seconds_of(pcm)
    if not SHORTEST_S <= seconds <= LONGEST_S:
        message = f"the recording is {seconds:.2f} s long; {SHORTEST_S:g} to {LONGEST_S:g} s are taken"
        raise JobError("invalid_audio", message, param=param)
    wave = np.frombuffer(pcm, dtype="<i2").astype(np.float32)
    if np.sqrt(np.dot(wave, wave) / len(wave)) < SILENCE_RMS * 2**15:
        raise JobError("invalid_audio", "the recording is silent", param=param)


def check_transcript(text: str, pcm: bytes) -> None:
    """Refuse a transcript that nobody can have said in `pcm`; JobError `invalid_value` on `ref_text`."""
    most = round(TEXT_BYTES + TEXT_BYTES_A_SECOND * seconds_of(pcm))
    if len(text.encode(errors="replace")) > most:
        message = f"ref_text is longer than what is said in {seconds_of(pcm):.1f} s; give the words of the recording"
        raise JobError("invalid_value", message, param="ref_text")
