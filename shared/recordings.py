"""Limits of a recording that a voice is cloned from: its length, and the length of its transcript.

The web workers check what a client uploads; the GPU worker checks again what it encodes or saves.
It knows neither files nor the sound itself: silence and damage are checked where the samples are.
"""

from typing import Final

MIN_RECORDING_S: Final = 1.0
MAX_RECORDING_S: Final = 60.0
"""Less says too little about a voice. A minute takes 750 positions of a Qwen3-TTS slot's cache."""

TRANSCRIPT_BYTES: Final = 200
TRANSCRIPT_BYTES_A_SECOND: Final = 60
"""UTF-8 that can be said in a recording, with a margin: the fastest speakers say 25 letters a second, and 15 of 3 bytes
each in the scripts with the longest encoding. A longer text is no transcript, and leaves no room to speak."""


def length_problem(seconds: float) -> str | None:
    """Why a recording of this length cannot be used, or None."""
    if seconds > MAX_RECORDING_S:
        return f"the recording is too long: {seconds:.2f} s, at most {MAX_RECORDING_S:g} s can be used"
    if seconds < MIN_RECORDING_S:
        return f"the recording is too short: {seconds:.2f} s, at least {MIN_RECORDING_S:g} s are needed"
    return None


def silence_problem(seconds: float) -> str:
    """Why a recording of this length without a voice cannot be used."""
    return f"the recording is silent: {seconds:.2f} s without a voice"


def transcript_problem(text: str, seconds: float) -> str | None:
    """Why `text` cannot be the transcript of a recording of this length, or None."""
    limit = round(TRANSCRIPT_BYTES + TRANSCRIPT_BYTES_A_SECOND * seconds)
    if len(text.encode(errors="replace")) > limit:
        return f"ref_text is longer than what is said in {seconds:.1f} s; give the words of the recording"
    return None
