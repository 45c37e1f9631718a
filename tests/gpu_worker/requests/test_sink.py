"""Sink: messages of one request, and credit."""

import pytest

from gpu_worker.engines.base import Done, JobError
from gpu_worker.requests import Cancelled, Outcome
from shared.pcm import SAMPLE_RATE
from shared.protocol import Audio, Failed, Finished, Started, Timings, Usage
from tests.gpu_worker.fakes import a_recorded_sink, a_request

USAGE = Usage(input_tokens=1, output_tokens=2)
TIMINGS = Timings(queue_s=0.0, load_s=0.0, first_audio_s=0.0, total_s=0.0)
DONE = Done("r", "stop", USAGE)


class TestSink:
    """Messages of one request, and credit."""

    def test_within_credit(self) -> None:
        """While there is credit, all messages are sent at once, with their numbers."""
        sink, sent = a_recorded_sink(2)
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
        sink, sent = a_recorded_sink(1)
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
        sink, sent = a_recorded_sink(0)
        sink.audio(b"aa")
        sink.failed(JobError("invalid_value", "no", param="input", retry_after_s=3))
        sink.grant(5)
        assert sent == [
            (Failed(id="r", code="invalid_value", message="no", param="input", retry_after_s=3), None),
        ]

    def test_negative_credit(self) -> None:
        """A negative grant takes no credit away."""
        sink, _ = a_recorded_sink(1)
        sink.grant(-4)
        assert not sink.stalled

    def test_bytes(self) -> None:
        """Bytes that wait for credit, and those sent but not granted back, are counted; the buffer counts the first."""
        sink, _ = a_recorded_sink(2)
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
        sink, _ = a_recorded_sink(0)
        request = a_request(sink=sink)
        request.start(0.0)
        request.push(b"aa", 1.0)
        request.park(100, 2.0)
        assert sink.buffer.used_bytes == 102
        request.end(outcome, 3.0)
        assert sink.buffer.used_bytes == 0
