"""What a listener makes of a stream: gaps that are ours, and none that are the reader's."""

import pytest

from gpu_worker.playback import Playback

FRAME_S = 0.08


def _heard(*pieces: tuple[float, float]) -> Playback:
    """A stream of (instant, seconds of audio)."""
    playback = Playback()
    for instant, seconds in pieces:
        playback.add(seconds, instant)
    return playback


def test_in_time() -> None:
    """Pieces that come before the last one has been played leave no gap, however long the first took."""
    playback = _heard((7.0, FRAME_S), (7.08, FRAME_S), (7.1, FRAME_S))
    assert (playback.dry_s, playback.audio_s) == (0.0, pytest.approx(3 * FRAME_S))


def test_late() -> None:
    """Each wait for a piece that comes too late is a gap, and the player goes on from there."""
    playback = _heard((0.0, 1.0), (1.5, 1.0), (2.0, 1.0), (4.0, 1.0))
    assert playback.dry_s == pytest.approx(0.5 + 0.5)


def test_reader_that_takes_nothing() -> None:
    """While the reader holds the stream up, the player stands still, with what it had left to play."""
    playback = _heard((0.0, 1.0))
    playback.hold(0.25)
    playback.hold(5.0)
    playback.add(0.5, 6.0)
    playback.go_on(60.25)
    assert (playback.held_s, playback.dry_s) == (60.0, 0.0)
    playback.add(0.5, 61.5)
    assert playback.dry_s == 0.0
    playback.add(0.5, 62.25)
    assert playback.dry_s == pytest.approx(0.25)


def test_reader_that_never_stopped() -> None:
    """More credit for a reader that has some changes nothing."""
    playback = _heard((0.0, 1.0))
    playback.go_on(0.5)
    playback.add(1.0, 1.25)
    assert (playback.held_s, playback.dry_s) == (0.0, 0.25)


def test_gap_before_the_reader_stopped() -> None:
    """A stream that had run dry by itself before its reader stopped keeps that gap, and no more."""
    playback = _heard((0.0, 1.0))
    playback.hold(2.0)
    playback.add(1.0, 2.0)
    playback.go_on(10.0)
    assert playback.dry_s == pytest.approx(1.0)
