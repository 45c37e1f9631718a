"""Where a request's speech goes, and where its time went."""

from typing import Any

import pytest

from gpu_worker.engines.base import Job, JobError
from gpu_worker.requests import CollectingSink, PeerSink, Request
from shared.pcm import SAMPLE_RATE
from shared.protocol import Audio, Failed, Finished, Started, Timings, Usage

USAGE = Usage(input_tokens=1, output_tokens=2)
TIMINGS = Timings(queue_s=0.0, load_s=0.0, first_audio_s=0.0, total_s=0.0)


def _sink(credit: int) -> tuple[PeerSink, list[tuple[Any, bytes | None]]]:
    sent: list[tuple[Any, bytes | None]] = []
    return PeerSink("r", lambda message, payload: sent.append((message, payload)), credit), sent


class TestPeerSink:
    """Speech for a web worker."""

    def test_within_credit(self) -> None:
        """Everything goes out at once, numbered, while there is credit."""
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
        """What there is no credit for waits, and the last word behind it."""
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
        """A failure is told at once; what was not sent yet never is."""
        sink, sent = _sink(0)
        sink.audio(b"aa")
        sink.failed(JobError("invalid_value", "no", param="input", retry_after_s=3))
        sink.grant(5)
        assert sent == [
            (Failed(id="r", code="invalid_value", message="no", param="input", retry_after_s=3), None),
        ]

    def test_credit_is_never_taken_back(self) -> None:
        """A negative grant is none."""
        sink, _ = _sink(1)
        sink.grant(-4)
        assert not sink.stalled


class TestCollectingSink:
    """Speech for the worker's own use."""

    def test_whole(self) -> None:
        """The pieces, joined, once; it never stalls."""
        heard: list[bytes | JobError] = []
        sink = CollectingSink(heard.append)
        sink.started("m")
        sink.audio(b"aa")
        sink.audio(b"bb")
        assert heard == []
        assert not sink.stalled
        sink.finished("stop", USAGE, TIMINGS)
        assert heard == [b"aabb"]

    def test_failed(self) -> None:
        """The error in place of the speech."""
        heard: list[bytes | JobError] = []
        error = JobError("invalid_value", "no")
        CollectingSink(heard.append).failed(error)
        assert heard == [error]

    def test_cut_off(self) -> None:
        """Speech that a cap had to end says what nobody asked for: an error, and nothing to keep."""
        heard: list[bytes | JobError] = []
        sink = CollectingSink(heard.append)
        sink.audio(b"aa")
        sink.finished("length", USAGE, TIMINGS)
        assert [error.code for error in heard if isinstance(error, JobError)] == ["synthesis_failed"]
        assert len(heard) == 1


class TestTimings:
    """Where a request's time went."""

    def _request(self) -> Request:
        return Request(
            peer=b"p",
            request_id="r",
            client="c",
            model="m",
            sink=_sink(1)[0],
            keep_alive_s=None,
            arrived=10.0,
            job=Job(id="j", task="Base", text="t"),
        )

    def test_whole_way(self) -> None:
        """Waited 5 s, 3 s of them for the model; heard 6 s after its arrival."""
        request = self._request()
        request.model_ready, request.admitted, request.first_audio = 13.0, 15.0, 16.0
        assert request.timings(20.0) == Timings(queue_s=5.0, load_s=3.0, first_audio_s=6.0, total_s=10.0)

    def test_model_was_there(self) -> None:
        """No part of the wait is the load's."""
        request = self._request()
        request.admitted = 12.0
        assert request.timings(12.0) == Timings(queue_s=2.0, load_s=0.0, first_audio_s=2.0, total_s=2.0)

    @pytest.mark.parametrize("ready", [5.0, 99.0])
    def test_load_is_part_of_the_wait(self, ready: float) -> None:
        """It is neither negative nor longer than the wait, whenever the model was moved."""
        request = self._request()
        request.model_ready, request.admitted = ready, 15.0
        timings = request.timings(20.0)
        assert 0.0 <= timings.load_s <= timings.queue_s
