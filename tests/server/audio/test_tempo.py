"""Tempo: the exact length, the same samples however the PCM is cut, and no click at the end."""

import array

import numpy as np
import pytest

from server.audio.tempo import Tempo
from shared.pcm import samples_of
from tests.audio import peak, tone

SPEEDS = [0.25, 0.4, 0.77, 1.25, 1.5, 2.0, 3.1, 4.0]
LOUD = tone(1.1, hertz=220, fade_s=0.0001)


def changed(pcm: bytes, speed: float, piece: int) -> bytes:
    """`pcm` through a Tempo, in pieces of `piece` samples."""
    tempo = Tempo(speed)
    parts = [tempo.feed(pcm[start : start + 2 * piece]) for start in range(0, len(pcm), 2 * piece)]
    return b"".join([*parts, tempo.finish()])


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("samples", [20_000, 20_641, 24_321])
def test_the_end_does_not_click(speed: float, samples: int) -> None:
    """A loud voice that ends at once is near zero at its last sample, where atempo was cut off or padded."""
    out = changed(LOUD[: 2 * samples], speed, 1_920)
    assert samples_of(out) == round(samples / speed)
    sounds = np.flatnonzero(np.frombuffer(out, "<i2"))
    assert peak(out[: 2 * (sounds[-1] + 1)][-4:]) < 200
    assert np.abs(np.diff(np.frombuffer(out, "<i2").astype(int))).max() < 1_500


@pytest.mark.parametrize("speed", SPEEDS)
def test_cuts_do_not_matter(speed: float) -> None:
    """Each way to cut the PCM gives the same samples."""
    whole = changed(LOUD, speed, len(LOUD))
    assert all(changed(LOUD, speed, piece) == whole for piece in (337, 960, 961, 1_920))


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("samples", [0, 1, 2, 959, 960, 961, 962, 1_921, 2_881])
def test_any_number_of_samples(speed: float, samples: int) -> None:
    """A single sample behind the others does not end the answer: atempo fails on one above twice the speed."""
    pcm = array.array("h", [1_000] * samples).tobytes()
    assert samples_of(changed(pcm, speed, 4_800)) == round(samples / speed)
