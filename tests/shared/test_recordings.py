"""The limits of a recording and of its transcript are the same on both sides."""

import pytest

from shared.recordings import length_problem, transcript_problem


@pytest.mark.parametrize(
    ("seconds", "problem"),
    [
        (0.0, "the recording is too short: 0.00 s, at least 1 s are needed"),
        (0.99, "the recording is too short: 0.99 s, at least 1 s are needed"),
        (1.0, None),
        (60.0, None),
        (60.01, "the recording is too long: 60.01 s, at most 60 s can be used"),
    ],
)
def test_length(seconds: float, problem: str | None) -> None:
    """From one second to one minute."""
    assert length_problem(seconds) == problem


@pytest.mark.parametrize(
    ("text", "fits"), [("", True), ("x" * 320, True), ("x" * 321, False), ("語" * 106, True), ("語" * 107, False)]
)
def test_transcript(text: str, *, fits: bool) -> None:
    """Two seconds hold 320 bytes of UTF-8, in any script."""
    assert (transcript_problem(text, 2.0) is None) == fits


def test_transcript_with_half_a_character() -> None:
    """A lone surrogate, which UTF-8 cannot encode, is no error of the check."""
    assert transcript_problem("\ud800", 1.0) is None
