"""Short fades where speech meets silence at a level that would click.

Only the edges that need it are changed: speech that begins and ends below -60 dB keeps every sample.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

FADE_IN_S: Final = 0.002
FADE_OUT_S: Final = 0.005
"""Long enough that the spectrum of the edge stays below that of speech, and too short to be heard as a fade."""

_AUDIBLE: Final = 33
"""-60 dB of full scale: a step from silence to at most this is not heard."""

_LAST_S: Final = 0.001
_LOUD: Final = 328
"""-40 dB: a wave of that level clicks where it stops, even if its last sample happens to be zero."""

_SILENCE_S: Final = 0.005
_SILENCE_PEAK: Final = 3
"""So many samples at this level or below are silence between two stretches of speech."""

Samples = NDArray[np.int16]


def fade_in(samples: Samples, rate: int) -> Samples:
    """`samples`, faded in if the first one is audible."""
    if not samples.size or abs(int(samples[0])) <= _AUDIBLE:
        return samples
    return _faded(samples, slice(0, round(FADE_IN_S * rate)), reverse=False)


def fade_out(samples: Samples, rate: int) -> Samples:
    """`samples`, faded out if the last one is audible, or the last millisecond is loud."""
    last = np.abs(samples[-round(_LAST_S * rate) :].astype(np.int32))
    if not last.size or (last[-1] <= _AUDIBLE and last.max() <= _LOUD):
        return samples
    return _faded(samples, slice(-round(FADE_OUT_S * rate), None), reverse=True)


def fade_at_silences(samples: Samples, rate: int) -> Samples:
    """Fade each stretch of speech between silences, the beginning and the end."""
    parts: list[Samples] = []
    begun = 0
    for start, end in _silences(samples, round(_SILENCE_S * rate)):
        parts += [fade_out(fade_in(samples[begun:start], rate), rate), samples[start:end]]
        begun = end
    return np.concatenate([*parts, fade_out(fade_in(samples[begun:], rate), rate)])


def _faded(samples: Samples, edge: slice, *, reverse: bool) -> Samples:
    faded = samples.copy()
    count = faded[edge].size
    ramp = np.sin(np.pi / 2 * (np.arange(count) + 0.5) / count) ** 2
    faded[edge] = np.rint(faded[edge] * (ramp[::-1] if reverse else ramp))
    return faded


def _silences(samples: Samples, shortest: int) -> list[tuple[int, int]]:
    """Start and end of each run of at least `shortest` silent samples."""
    silent = np.concatenate(([False], np.abs(samples.astype(np.int32)) <= _SILENCE_PEAK, [False]))
    edges = np.flatnonzero(silent[1:] != silent[:-1]).reshape(-1, 2)
    return [(int(start), int(end)) for start, end in edges if end - start >= shortest]
