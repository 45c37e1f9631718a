"""The benchmark's player: when it can begin, and when it underruns."""

import pytest

from server.audio import Encoder
from tests.benchmarks.playback import listen, play

SECOND = bytes(48_000)


def test_player_that_is_always_ahead_never_stalls() -> None:
    """Audio that arrives before it is due causes no underrun."""
    assert listen([(1.0, 0.5), (1.4, 0.5), (1.9, 0.5)]) == (1.0, 1.5, 0, 0.0)


def test_each_gap_is_one_stall() -> None:
    """Every gap is one stall of the gap's length, and delays the playback of the rest by as much."""
    first, audio_s, stalls, stall_s = listen([(1.0, 0.0), (2.0, 1.0), (3.5, 1.0), (4.4, 1.0), (6.0, 1.0)])
    assert (first, audio_s, stalls) == (2.0, 4.0, 2)
    assert stall_s == pytest.approx(0.5 + 0.5)


def test_an_answer_without_audio_is_an_error() -> None:
    """An answer without audio has no playback."""
    with pytest.raises(ValueError, match="no audio"):
        listen([(1.0, 0.0)])


def test_pcm_is_counted_across_cuts_inside_a_sample() -> None:
    """One byte is not playable; with the next it is one sample."""
    heard = play([(0.1, SECOND[:1]), (0.2, SECOND[:47_999])], "pcm")
    assert (heard.first_byte_s, heard.first_playable_s, heard.audio_s) == (0.1, 0.2, 1.0)


def test_mp3_is_as_long_as_what_was_encoded() -> None:
    """Decoding the pieces gives the length of the encoded speech, but for the codec's last packet."""
    encoder = Encoder("mp3")
    pieces = [encoder.feed(SECOND), encoder.feed(SECOND), encoder.finish()]
    heard = play([(0.5, pieces[0]), (1.5, pieces[1]), (1.6, pieces[2])], "mp3")
    assert heard.first_playable_s == 0.5
    assert heard.audio_s == pytest.approx(2.0, abs=0.07)
    assert heard.stalls <= 1
