"""Request and its parts: sink, playback clock, states and timings."""

from typing import Any

import pytest

from gpu_worker.engines.base import Done, JobError
from gpu_worker.requests import Cancelled, Outcome, Playback, Request, RequestState, Sink
from shared.pcm import SAMPLE_RATE
from shared.protocol import Audio, Failed, Finished, Started, Timings, Usage
from tests.gpu_worker.fakes import a_request

USAGE = Usage(input_tokens=1, output_tokens=2)
TIMINGS = Timings(queue_s=0.0, load_s=0.0, first_audio_s=0.0, total_s=0.0)
DONE = Done("r", "stop", USAGE)
FRAME_S = 0.08


def _sink(credit: int) -> tuple[Sink, list[tuple[Any, bytes | None]]]:
    sent: list[tuple[Any, bytes | None]] = []
    return Sink("r", lambda message, payload: sent.append((message, payload)), credit), sent


class TestSink:
    """Messages of one request, and credit."""

    def test_within_credit(self) -> None:
        """While there is credit, all messages are sent at once, with their numbers."""
        sink, sent = _sink(2)
        sink.started("m")
        sink.audio(b"aa")
        sink.audio(b"bb")
        sink.finished("length", USAGE, TIMINGS)
        assert sent == [
            (Started(id="r", model="m", sample_rate=SAMPLE_RATE), None),
            (Audio(id="r", seq=0), b"aa"),
            (Audio(id="r", seq=1), b"bb"),
            (Finished(id="r", reason="length", usage=USAGE, timings=TIMINGS), None),
        ]
        assert sink.drained

    def test_beyond_credit(self) -> None:
        """Audio without credit waits, and Finished waits behind it."""
        sink, sent = _sink(1)
        for piece in (b"aa", b"bb", b"cc"):
            sink.audio(piece)
        sink.finished("stop", USAGE, TIMINGS)
        assert [payload for _, payload in sent] == [b"aa"]
        assert (sink.stalled, sink.drained) == (True, False)
        sink.grant(1)
        assert [payload for _, payload in sent] == [b"aa", b"bb"]
        assert (sink.stalled, sink.drained) == (True, False)
        sink.grant(5)
        assert [payload for _, payload in sent] == [b"aa", b"bb", b"cc", None]
        assert (sink.stalled, sink.drained) == (False, True)

    def test_failure_overtakes(self) -> None:
        """Failed is sent at once; waiting audio is dropped."""
        sink, sent = _sink(0)
        sink.audio(b"aa")
        sink.failed(JobError("invalid_value", "no", param="input", retry_after_s=3))
        sink.grant(5)
        assert sent == [
            (Failed(id="r", code="invalid_value", message="no", param="input", retry_after_s=3), None),
        ]

    def test_negative_credit(self) -> None:
        """A negative grant takes no credit away."""
        sink, _ = _sink(1)
        sink.grant(-4)
        assert not sink.stalled


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
        assert (playback.underrun_s, playback.audio_s) == (0.0, pytest.approx(3 * FRAME_S))

    def test_late(self) -> None:
        """Every wait for a late piece is an underrun, and the player goes on from there."""
        playback = self._playback((0.0, 1.0), (1.5, 1.0), (2.0, 1.0), (4.0, 1.0))
        assert playback.underrun_s == pytest.approx(0.5 + 0.5)

    def test_paused_reader(self) -> None:
        """While the reader is paused the player stands still, with the audio that it had left."""
        playback = self._playback((0.0, 1.0))
        playback.pause(0.25)
        playback.pause(5.0)
        playback.add(0.5, 6.0)
        playback.resume(60.25)
        assert (playback.paused_s, playback.underrun_s) == (60.0, 0.0)
        playback.add(0.5, 61.5)
        assert playback.underrun_s == 0.0
        playback.add(0.5, 62.25)
        assert playback.underrun_s == pytest.approx(0.25)

    def test_resume_without_a_pause(self) -> None:
        """More credit for a reader that is not paused changes nothing."""
        playback = self._playback((0.0, 1.0))
        playback.resume(0.5)
        playback.add(1.0, 1.25)
        assert (playback.paused_s, playback.underrun_s) == (0.0, 0.25)

    def test_underrun_before_the_pause(self) -> None:
        """An underrun before the pause counts up to the pause."""
        playback = self._playback((0.0, 1.0))
        playback.pause(2.0)
        playback.add(1.0, 2.0)
        playback.resume(10.0)
        assert playback.underrun_s == pytest.approx(1.0)


class TestStates:
    """QUEUED -> RUNNING -> DRAINING -> DONE."""

    def _running(self, credit: int) -> tuple[Request, list[tuple[Any, bytes | None]]]:
        sink, sent = _sink(credit)
        request = a_request(sink=sink)
        assert request.state is RequestState.QUEUED
        request.start(0.0)
        assert request.state is RequestState.RUNNING
        return request, sent

    def test_read_to_the_end(self) -> None:
        """With credit for everything, the end of the speech is the end of the request."""
        request, sent = self._running(credit=1)
        request.push(b"aa", 1.0)
        request.end(DONE, 2.0)
        assert request.state is RequestState.DONE
        assert [type(message) for message, _ in sent] == [Started, Audio, Finished]

    def test_drains(self) -> None:
        """Without credit for the last piece the request is DRAINING until that is granted."""
        request, sent = self._running(credit=1)
        request.push(b"aa", 1.0)
        request.push(b"bb", 1.0)
        request.end(DONE, 2.0)
        assert (request.state, request.stalled) == (RequestState.DRAINING, True)
        request.grant(1, 3.0)
        assert request.state is RequestState.DONE
        assert [type(message) for message, _ in sent] == [Started, Audio, Audio, Finished]

    @pytest.mark.parametrize(
        ("outcome", "last"),
        [(JobError("client_too_slow", "no"), Failed), (Cancelled(), Audio)],
        ids=["failed", "cancelled"],
    )
    @pytest.mark.parametrize("draining", [False, True])
    def test_ends_early(self, outcome: Outcome, last: type, *, draining: bool) -> None:
        """A failure is the last message, a cancel sends none; later credit brings nothing."""
        request, sent = self._running(credit=1)
        request.push(b"aa", 1.0)
        request.push(b"bb", 1.0)
        if draining:
            request.end(DONE, 1.0)
        request.end(outcome, 2.0)
        assert request.state is RequestState.DONE
        assert isinstance(sent[-1][0], last)
        assert len(sent) == (3 if last is Failed else 2)

    def test_queued_is_not_stalled(self) -> None:
        """A queued request has nothing to read yet, so a lack of credit is no stall."""
        request = a_request(sink=_sink(0)[0])
        assert not request.stalled
        request.start(0.0)
        assert request.stalled


class TestTimings:
    """Where a request's time went."""

    def _started(self, at: float, *, ready_at: float = 10.0) -> Request:
        request = a_request(arrived_at=10.0)
        request.model_ready_at = ready_at
        request.start(at)
        return request

    def test_with_a_load(self) -> None:
        """Queued for 5 s, 3 s of them for the model; first audio 6 s after the arrival."""
        request = self._started(15.0, ready_at=13.0)
        request.push(b"", 16.0)
        request.push(b"", 17.0)
        assert request.timings(20.0) == Timings(queue_s=5.0, load_s=3.0, first_audio_s=6.0, total_s=10.0)

    def test_model_was_resident(self) -> None:
        """The wait contains no load."""
        timings = self._started(12.0).timings(12.0)
        assert timings == Timings(queue_s=2.0, load_s=0.0, first_audio_s=2.0, total_s=2.0)

    @pytest.mark.parametrize("ready_at", [5.0, 99.0])
    def test_load_is_part_of_the_wait(self, ready_at: float) -> None:
        """The load is neither negative nor longer than the wait, whenever the model arrived."""
        timings = self._started(15.0, ready_at=ready_at).timings(20.0)
        assert 0.0 <= timings.load_s <= timings.queue_s
