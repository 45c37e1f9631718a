"""Requests whose text is still being written: their text, their slots, and how they end."""

import pytest

from gpu_worker.requests import MIN_SLICE_S, RequestState
from gpu_worker.transport import PeerGone
from gpu_worker.worker import Drain
from shared.protocol import Failed
from tests.gpu_worker.lifecycle.test_slots import _state
from tests.gpu_worker.worker_bench import WEB, MakeBench, loaded


def test_text_in_pieces_is_spoken_as_it_comes(make_bench: MakeBench) -> None:
    """Each word is spoken once it is complete, the last one when the text ends."""
    bench = loaded(make_bench())
    bench.speak("r", "", open=True, segments=[])
    bench.settle()
    assert bench.kinds("r") == ["Started"]
    bench.append("r", "one two th")
    bench.settle()
    assert bench.words("r") == "one two"
    bench.append("r", "ree")
    bench.append("r", " four")
    bench.settle()
    assert bench.words("r") == "one two three"
    bench.end_text("r")
    bench.settle()
    assert bench.words("r") == "one two three four"
    assert bench.kinds("r")[-1] == "Finished"
    assert bench.references() == {"m": 0}
    assert not bench.worker._requests


def test_text_that_comes_before_a_slot_is_kept(make_bench: MakeBench) -> None:
    """A request in the queue takes its text, and its end, too."""
    bench = loaded(make_bench(slots=1))
    bench.engines["m"].muted.add("other")
    bench.speak("other", "other")
    bench.speak("r", "one", open=True)
    bench.append("r", " two th")
    bench.append("r", "ree")
    bench.end_text("r")
    bench.settle()
    assert bench.kinds("r") == []
    bench.cancel("other")
    bench.settle()
    assert bench.words("r") == "one two three"
    assert bench.kinds("r")[-1] == "Finished"


def test_text_of_an_unknown_or_complete_request_is_ignored(make_bench: MakeBench) -> None:
    """It may be on its way when the request ends."""
    bench = loaded(make_bench())
    bench.append("nobody", "one")
    bench.end_text("nobody")
    bench.speak("whole", "a b")
    bench.append("whole", " c")
    bench.settle()
    bench.append("whole", " d")
    bench.settle()
    assert bench.words("whole") == "a b"


def test_a_request_that_waits_for_text_gives_its_slot_to_others(make_bench: MakeBench) -> None:
    """To a newcomer, however little audio it has in hand; and it is back once it has text."""
    bench = loaded(make_bench(slots=1))
    bench.speak("r", "", open=True, segments=[])
    bench.settle()
    bench.clock.advance(MIN_SLICE_S)
    bench.speak("other", "x y")
    bench.settle()
    assert bench.words("other") == "x y"
    assert _state(bench, "r") is RequestState.PARKED
    bench.clock.advance(1)
    bench.turn(2)
    assert bench.snapshot().waiting_for_text == 1
    bench.append("r", "one two")
    bench.end_text("r")
    bench.settle()
    assert bench.words("r") == "one two"
    assert bench.snapshot().waiting_for_text == 0


def test_a_waiting_request_holds_nobody_back(make_bench: MakeBench) -> None:
    """It has made no audio yet, as a newcomer; but the others need not leave it the device."""
    bench = loaded(make_bench(slots=2))
    bench.engines["m"].word_s = 1.0
    bench.speak("long", " ".join("abcdefghij"))
    bench.turn(5)
    bench.speak("r", "", open=True, segments=[])
    before = len(bench.words("long"))
    bench.turn(3)
    assert len(bench.words("long")) > before + 3


def test_text_that_stays_away_ends_the_request(make_bench: MakeBench) -> None:
    """After the timeout since its last piece, counted while it waits, in a slot or parked."""
    bench = loaded(make_bench(open_text_timeout_s=5))
    bench.speak("r", "one ", open=True)
    bench.settle()
    for piece in ("two ", "three "):
        bench.clock.advance(4.9)
        bench.settle()
        bench.append("r", piece)
        bench.settle()
        bench.clock.advance(0.2)
        bench.settle()
    assert bench.words("r") == "one two three"
    bench.clock.advance(5.1)
    bench.settle()
    failed = bench.last_message("r")
    assert isinstance(failed, Failed)
    assert failed.code == "request_timeout"
    assert not bench.worker._requests
    assert bench.engines["m"].job_ids == set()


def test_a_text_has_a_limit(make_bench: MakeBench) -> None:
    """All pieces together may have as many characters as a whole text, with a slot or without."""
    bench = loaded(make_bench(max_input_chars=10, slots=1))
    for name in ("r", "queued"):
        bench.speak(name, "12345", open=True)
        bench.append(name, " 789")
    bench.settle()
    assert bench.kinds("r")[-1] != "Failed"
    for name in ("r", "queued"):
        bench.append(name, "ab")
        bench.settle()
        assert bench.last_message(name).code == "invalid_value"
    assert not bench.worker._requests


def test_a_drain_lets_what_has_come_be_said(make_bench: MakeBench) -> None:
    """Then an error follows, because the client may have had more text; text that comes meanwhile is ignored."""
    bench = loaded(make_bench())
    bench.speak("r", "one two thr", open=True, credit=2)
    bench.settle()
    bench.inbox.put(Drain(deadline_s=30))
    bench.append("r", "ee")
    bench.settle()
    assert bench.words("r") == "one two"
    bench.credit("r", 5)
    bench.settle()
    assert bench.words("r") == "one two thr"
    assert bench.last_message("r").code == "shutting_down"
    assert not bench.worker._requests


def test_waiting_for_text_is_no_underrun(make_bench: MakeBench) -> None:
    """Neither counts it in the real-time factor, nor in the time to first audio."""
    bench = loaded(make_bench())
    bench.engines["m"].word_s = 1.0
    bench.speak("r", "", open=True, segments=[])
    bench.settle()
    before = bench.snapshot().model_stats["m"]
    bench.clock.advance(20)
    bench.settle()
    bench.append("r", "one ")
    bench.settle()
    bench.clock.advance(20)
    bench.settle()
    bench.append("r", "two")
    bench.end_text("r")
    bench.settle()
    after = bench.snapshot().model_stats["m"]
    assert after.underrun_s.sum == before.underrun_s.sum
    assert after.first_audio_s.sum < before.first_audio_s.sum + 1
    assert after.real_time_factor.sum < before.real_time_factor.sum + 1


@pytest.mark.parametrize("end", ["cancelled", "gone", "broken"])
@pytest.mark.parametrize("parked", [False, True])
def test_a_request_that_waits_for_text_ends_as_any_other(make_bench: MakeBench, end: str, *, parked: bool) -> None:
    """Its client leaves, its web worker dies, or its engine fails: no slot stays, and late text finds nobody."""
    bench = loaded(make_bench(slots=1))
    bench.speak("r", "one tw", open=True)
    bench.settle()
    if parked:
        bench.clock.advance(MIN_SLICE_S)
        bench.speak("other", "x")
        bench.settle()
        assert _state(bench, "r") is RequestState.PARKED
    if end == "cancelled":
        bench.cancel("r")
    elif end == "gone":
        bench.inbox.put(PeerGone(WEB))
    else:
        bench.engines["m"].step_errors.append(RuntimeError("broken"))
        bench.append("r", "o three")
    bench.settle()
    bench.append("r", " four")
    bench.end_text("r")
    bench.settle()
    assert bench.kinds("r")[-1] == ("Failed" if end == "broken" else "Audio")
    assert not bench.worker._requests
    assert bench.references() == {"m": 0}
    assert bench.engines["m"].job_ids == bench.engines["m"].parked == set()
    assert bench.buffer.used_bytes == 0
