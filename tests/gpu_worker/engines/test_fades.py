"""Fades: an edge that would click is faded, every other sample stays."""

import numpy as np
import pytest

from gpu_worker.engines.fades import FADE_IN_S, FADE_OUT_S, Samples, fade_at_silences, fade_in, fade_out

RATE = 24_000
LOUD = np.full(2_400, 8_000, np.int16)
SPEECH = np.rint(8_000 * np.sin(np.arange(2_400) * np.pi / 40)).astype(np.int16)  # 300 Hz, 30 periods
GAP = np.zeros(240, np.int16)


def steps(samples: Samples) -> int:
    """The largest difference between neighbours, the silence around `samples` included."""
    return int(np.abs(np.diff(np.concatenate(([0], samples.astype(int), [0])))).max())


def test_a_loud_beginning_rises() -> None:
    """The first sample is near zero, and behind two milliseconds nothing is changed."""
    faded = fade_in(LOUD, RATE)
    fade = round(FADE_IN_S * RATE)
    assert abs(int(faded[0])) <= 33
    assert (np.diff(faded[:fade].astype(int)) > 0).all()
    assert np.array_equal(faded[fade:], LOUD[fade:])


def test_a_loud_end_falls() -> None:
    """The last sample is near zero, and before the last five milliseconds nothing is changed."""
    faded = fade_out(LOUD, RATE)
    fade = round(FADE_OUT_S * RATE)
    assert abs(int(faded[-1])) <= 33
    assert (np.diff(faded[-fade:].astype(int)) < 0).all()
    assert np.array_equal(faded[:-fade], LOUD[:-fade])


@pytest.mark.parametrize("level", [0, 5, 33, -33])
def test_what_does_not_click_is_left_alone(level: int) -> None:
    """Speech that begins and ends below -60 dB keeps every sample."""
    quiet = LOUD.copy()
    quiet[:48] = quiet[-48:] = level
    assert fade_out(fade_in(quiet, RATE), RATE) is quiet


def test_a_wave_that_stops_at_zero_is_faded() -> None:
    """The last sample is zero by chance; the wave before it is loud."""
    assert SPEECH[2_400 - 40] == 0
    stopped = SPEECH[: 2_400 - 39]
    assert np.abs(fade_out(stopped, RATE)[-24:]).max() < 1_000 < np.abs(stopped[-24:]).max()


@pytest.mark.parametrize("length", [0, 1, 10, 47])
def test_tiny_pieces(length: int) -> None:
    """A piece shorter than a fade keeps its length, and its edge does not click."""
    assert fade_in(LOUD[:length], RATE).size == fade_out(LOUD[:length], RATE).size == length
    assert fade_at_silences(LOUD[:length], RATE).size == length


def test_every_stretch_between_silences_is_faded() -> None:
    """Steps of 8,000 at the beginning, at both silences and at the end become slopes; the lengths stay."""
    text = np.concatenate([LOUD, GAP, -LOUD, GAP, LOUD])
    faded = fade_at_silences(text, RATE)
    assert faded.size == text.size
    assert steps(text) == 8_000
    assert steps(faded) < 8_000 * np.pi / 2 / round(FADE_IN_S * RATE) + 1
    assert not faded[2_400:2_640].any()


def test_a_zero_crossing_is_no_silence() -> None:
    """Quiet moments shorter than five milliseconds belong to the speech."""
    text = np.concatenate([LOUD, GAP[:100], LOUD])
    faded = fade_at_silences(text, RATE)
    assert np.array_equal(faded[200:-200], text[200:-200])


@pytest.mark.parametrize("samples", [GAP, GAP[:0], np.concatenate([GAP, SPEECH // 500, GAP])])
def test_silence_and_whispers_stay(samples: Samples) -> None:
    """Silence, nothing at all and the quietest speech come back as they were."""
    assert np.array_equal(fade_at_silences(samples, RATE), samples)
