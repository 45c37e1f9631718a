"""Request and its parts: sink, playback clock, states and timings."""

from typing import Any

import pytest

from gpu_worker.engines.base import Done, JobError
from gpu_worker.requests import STALLED_AFTER_S, Cancelled, Outcome, Playback, Request, RequestState, Sink
from gpu_worker.slot_policy import MIN_SLICE_S
from shared.pcm import SAMPLE_RATE, bytes_for
from shared.protocol import Audio, Failed, Finished, Started, Timings, Usage
from tests.gpu_worker.fakes import a_request, a_sink

USAGE = Usage(input_tokens=1, output_tokens=2)
TIMINGS = Timings(queue_s=0.0, load_s=0.0, first_audio_s=0.0, total_s=0.0)
DONE = Done("r", "stop", USAGE)
FRAME_S = 0.08


def _sink(credit: int) -> tuple[Sink, list[tuple[Any, bytes | None]]]:
    sent: list[tuple[Any, bytes | None]] = []
    return a_sink(credit=credit, send=lambda message, payload: sent.append((message, payload))), sent


class TestBatch:
    """When a batch request yields to others."""

    def test_patience(self) -> None:
        """After a minute of waiting it counts as any other, for one slice of its slot; a slice of nothing is none."""
        request = a_request(is_batch=True, arrived_at=1_000.0)
        assert request.yields(1_059.9)
        assert not request.yields(1_060.0)
        request.start(1_010.0)
        assert request.yields(2_000.0)
        request.park(0, 1_010.0 + MIN_SLICE_S / 2)
        assert not request.yields(1_060.0)
        request.unpark(1_060.0)
        assert not request.yields(2_000.0)
        request.park(0, 1_060.0 + MIN_SLICE_S)
        assert request.yields(1_100.0)

    def test_others_never_yield(self) -> None:
        """However short they wait."""
        assert not a_request(arrived_at=1_000.0).yields(1_000.0)


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

    def test_bytes(self) -> None:
        """What waits for credit and what is sent but not granted back are counted; the buffer counts what waits."""
        sink, _ = _sink(2)
        sent = [sink.audio(piece) for piece in (b"a", b"bb", b"ccc", b"dddd")]
        assert (sent, sink.waiting_bytes, sink.unread_bytes) == ([1, 2, 0, 0], 7, 3)
        assert sink.buffer.used_bytes == 7
        assert sink.grant(1) == 3
        assert (sink.waiting_bytes, sink.unread_bytes, sink.buffer.used_bytes) == (4, 5, 4)
        assert sink.grant(9) == 4
        assert (sink.waiting_bytes, sink.unread_bytes, sink.buffer.used_bytes) == (0, 4, 0)

    @pytest.mark.parametrize("outcome", [JobError("client_too_slow", "no"), Cancelled()])
    def test_gives_its_bytes_back(self, outcome: Outcome) -> None:
        """A request that ends early leaves nothing in the buffer, neither audio nor its parked state."""
        sink, _ = _sink(0)
        request = a_request(sink=sink)
        request.start(0.0)
        request.push(b"aa", 1.0)
        request.park(100, 2.0)
        assert sink.buffer.used_bytes == 102
        request.end(outcome, 3.0)
        assert sink.buffer.used_bytes == 0


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
        assert (request.state, request.sink.stalled) == (RequestState.DRAINING, True)
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

    def test_parked(self) -> None:
        """A parked request takes audio that was under way, and credit; it can end, or get a slot again."""
        request, sent = self._running(credit=1)
        request.park(10, 1.0)
        assert request.state is RequestState.PARKED
        request.push(b"aa", 1.0)
        request.push(b"bb", 1.0)
        request.grant(1, 2.0)
        assert request.state is RequestState.PARKED
        request.unpark(3.0)
        assert (request.state, request.parked_bytes) == (RequestState.RUNNING, 0)
        request.park(10, 4.0)
        request.end(DONE, 5.0)
        assert (request.state, request.sink.buffer.used_bytes) == (RequestState.DONE, 0)
        assert [payload for _, payload in sent] == [None, b"aa", b"bb", None]

    def test_unread(self) -> None:
        """The time without credit counts from its last piece or the start, in a slot, parked or drained alike."""
        request = a_request(sink=_sink(0)[0])
        assert request.unread_s(5.0) == 0.0
        request.start(5.0)
        assert request.unread_s(7.0) == 2.0
        request.grant(2, 8.0)
        assert request.unread_s(9.0) == 0.0
        request.push(b"aa", 9.0)
        request.push(b"bb", 10.0)
        request.push(b"cc", 11.0)
        request.park(1, 12.0)
        request.end(DONE, 13.0)
        assert request.unread_s(15.0) == 5.0
        assert request.shown_state(10.0 + STALLED_AFTER_S) == "buffered"
        assert request.shown_state(10.5 + STALLED_AFTER_S) == "stalled"


class TestInHand:
    """The audio that a request's listener has not heard yet."""

    def _in_hand_s(self, request: Request, now: float) -> float:
        return round(request.holding(now).in_hand_s, 6)

    def test_reader_that_takes_everything(self) -> None:
        """Audio that was sent is heard a second a second; none is in hand after an underrun."""
        request = a_request()
        request.start(0.0)
        assert self._in_hand_s(request, 0.0) == 0.0
        request.push(bytes(bytes_for(4.0)), 1.0)
        assert [self._in_hand_s(request, now) for now in (1.0, 2.0, 9.0)] == [4.0, 3.0, 0.0]
        assert request.holding(2.0).slice_s == 2.0

    def test_reader_that_takes_nothing(self) -> None:
        """Audio that waits, or that was sent and not read, stays in hand."""
        request = a_request(sink=_sink(1)[0])
        request.start(0.0)
        for _ in range(3):
            request.push(bytes(bytes_for(2.0)), 1.0)
        assert [self._in_hand_s(request, now) for now in (1.0, 60.0)] == [6.0, 6.0]
        request.grant(1, 60.0)
        assert self._in_hand_s(request, 60.0) == 6.0
        request.grant(5, 61.0)
        assert [self._in_hand_s(request, now) for now in (61.0, 62.0)] == [5.0, 4.0]

    def test_slice(self) -> None:
        """A slice begins with the slot, anew after each time parked."""
        request = a_request()
        request.start(1.0)
        request.park(1, 3.0)
        request.unpark(7.0)
        assert request.holding(9.0).slice_s == 2.0


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
