"""Request: states, audio in hand, and timings."""

from typing import Any

import pytest

from gpu_worker.engines.base import Done, JobError
from gpu_worker.requests import MIN_SLICE_S, STALLED_AFTER_S, Cancelled, Outcome, Request, RequestState
from shared.pcm import bytes_for
from shared.protocol import Audio, Failed, Finished, Started, Timings, Usage
from tests.gpu_worker.fakes import a_recorded_sink, a_request

USAGE = Usage(input_tokens=1, output_tokens=2)
TIMINGS = Timings(queue_s=0.0, load_s=0.0, first_audio_s=0.0, total_s=0.0)
DONE = Done("r", "stop", USAGE)
FRAME_S = 0.08


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


class TestStates:
    """QUEUED -> RUNNING -> DRAINING -> DONE."""

    def _running(self, credit: int) -> tuple[Request, list[tuple[Any, bytes | None]]]:
        sink, sent = a_recorded_sink(credit)
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
        request = a_request(sink=a_recorded_sink(0)[0])
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
        return round(request.in_hand_s(now), 6)

    def test_reader_that_takes_everything(self) -> None:
        """Audio that was sent is heard a second a second; none is in hand after an underrun."""
        request = a_request()
        request.start(0.0)
        assert self._in_hand_s(request, 0.0) == 0.0
        request.push(bytes(bytes_for(4.0)), 1.0)
        assert [self._in_hand_s(request, now) for now in (1.0, 2.0, 9.0)] == [4.0, 3.0, 0.0]
        assert request.slice_s(2.0) == 2.0

    def test_reader_that_takes_nothing(self) -> None:
        """Audio that waits, or that was sent and not read, stays in hand."""
        request = a_request(sink=a_recorded_sink(1)[0])
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
        assert request.slice_s(9.0) == 2.0


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
