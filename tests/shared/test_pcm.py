"""The arithmetic of samples, bytes and seconds."""

import pytest

from shared.pcm import FRAME_SAMPLES, SAMPLE_RATE, SILENCE_PIECE_S, bytes_for, samples_of, seconds_of, silence


def test_one_second() -> None:
    """A second has 24,000 samples of two bytes."""
    assert bytes_for(1.0) == 48_000
    assert samples_of(b"\0" * 48_000) == SAMPLE_RATE
    assert seconds_of(memoryview(b"\0" * 48_000)) == 1.0


def test_one_frame() -> None:
    """A frame is 80 ms."""
    assert bytes_for(0.08) == FRAME_SAMPLES * 2


def test_nothing() -> None:
    """No bytes have no duration."""
    assert (samples_of(b""), seconds_of(b""), bytes_for(0.0)) == (0, 0.0, 0)


@pytest.mark.parametrize("seconds", [0.1, 1 / 3, 0.00001, 7.77777])
def test_whole_samples(seconds: float) -> None:
    """Any duration is rounded to whole samples."""
    assert bytes_for(seconds) % 2 == 0
    assert abs(bytes_for(seconds) / 2 - seconds * SAMPLE_RATE) <= 0.5


def test_half_a_sample() -> None:
    """Bytes that end inside a sample are an error."""
    with pytest.raises(ValueError, match=r"3 bytes .* end inside a sample"):
        samples_of(b"abc")
    with pytest.raises(ValueError, match="1 bytes"):
        seconds_of(b"a")


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.64, 30.1])
def test_silence(seconds: float) -> None:
    """It comes to a sample, in pieces that are short enough to be sent one by one."""
    pieces = silence(seconds)
    assert b"".join(pieces) == bytes(bytes_for(seconds))
    assert max(map(len, pieces), default=0) <= bytes_for(SILENCE_PIECE_S)
    assert all(pieces)
