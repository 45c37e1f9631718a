"""The load benchmark's evaluation of its answers."""

import pytest

from tests.benchmarks.client import Answer
from tests.benchmarks.load import Round, _verdict
from tests.benchmarks.playback import play

WHOLE = bytes(2 * 1920 * 10)


def a_round(*answers: Answer, frames: int = 10) -> Round:
    """Ten seconds at one request a second."""
    played = [play(answer.arrivals, "pcm") for answer in answers if not answer.error]
    return Round(rate=1, audio_format="pcm", answers=list(answers), played=played, wall_s=10.0, frames=frames)


def an_answer(*arrivals: tuple[float, bytes], status: int = 200, error: str = "", sent_s: float = 0.0) -> Answer:
    """An answer that ended after 0.4 s."""
    return Answer(sent_s=sent_s, ended_s=0.4, arrivals=list(arrivals), status=status, error=error)


def test_row_counts_every_request_once() -> None:
    """Complete, refused and failed requests add up; percentiles are those of the complete ones."""
    spoken = an_answer((0.1, WHOLE[:3840]), (0.3, WHOLE[3840:]))
    round_ = a_round(spoken, an_answer(status=429, error="429 full"), an_answer(status=500, error="500 no"))
    cells = [cell.strip() for cell in round_.row().strip("|").split("|")]
    assert cells == ["1", "pcm", "3", "1", "1", "1", "100", "100", "0.50", "1", "0.12", "0.1", "0"]


def test_answers_shorter_than_declared_are_counted() -> None:
    """An answer with a frame too few is cut short; one with the declared length is not."""
    assert a_round(an_answer((0.1, WHOLE))).cut_short == 0
    assert a_round(an_answer((0.1, WHOLE)), frames=11).cut_short == 1


def test_failure_is_an_exit_code_and_a_refusal_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """One failed request fails the benchmark; a refusal does not. The client's own delay is printed."""
    refused = an_answer(status=429, error="429 full")
    assert _verdict([a_round(refused)]) == 0
    assert "too busy" not in capsys.readouterr().out
    assert _verdict([a_round(refused, an_answer(error="EOFError: cut"), an_answer((0.1, WHOLE), sent_s=0.1))]) == 1
    said = capsys.readouterr().out
    assert "EOFError: cut" in said
    assert "429" not in said
    assert "too busy" in said
