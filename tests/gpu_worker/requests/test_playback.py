"""Playback: the clock of a listener."""

import pytest

from gpu_worker.requests.playback import Playback

FRAME_S = 0.08


class TestPlayback:
    """Underruns of a player, without the pauses of its reader."""

    def _playback(self, *pieces: tuple[float, float]) -> Playback:
        """A stream of (time, seconds of audio)."""
        playback = Playback()
        for now, seconds in pieces:
            playback.add(seconds, now)
        return playback

    def test_in_time(self) -> None:
        """Pieces that arrive before the last one has been played cause no underrun, however late the first is."""
        playback = self._playback((7.0, FRAME_S), (7.08, FRAME_S), (7.1, FRAME_S))
        assert playback.underrun_s == 0.0
        assert playback.ahead_s(7.1) == pytest.approx(3 * FRAME_S - 0.1)

    def test_late(self) -> None:
        """Every wait for a late piece is an underrun, and the player goes on from there."""
        playback = self._playback((0.0, 1.0), (1.5, 1.0), (2.0, 1.0), (4.0, 1.0))
        assert playback.underrun_s == pytest.approx(0.5 + 0.5)

    def test_resumed(self) -> None:
        """A reader that had stopped plays what it still had to read; until that is over, nothing is late."""
        playback = self._playback((0.0, 1.0))
        playback.resume(0.5, 60.0)
        playback.add(0.5, 60.25)
        assert playback.underrun_s == 0.0
        playback.add(0.5, 61.25)
        assert playback.underrun_s == pytest.approx(0.25)

    def test_resumed_at_once(self) -> None:
        """A reader that takes more before it has played what it had loses nothing of that."""
        playback = self._playback((0.0, 5.0))
        playback.resume(0.5, 1.0)
        assert playback.ahead_s(1.0) == pytest.approx(4.0)

    def test_before_the_first_piece(self) -> None:
        """Without audio there is nothing to play."""
        playback = Playback()
        playback.resume(1.0, 5.0)
        assert playback.ahead_s(5.0) == 0.0
