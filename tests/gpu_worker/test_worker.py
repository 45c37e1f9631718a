"""The synthesis loop, turn by turn: real queue, residency and loader, engines that speak words."""

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from gpu_worker.engines.base import JobError, Pcm
from gpu_worker.engines.faults import BrokenDeviceError
from gpu_worker.residency import MoverFailed, Progress
from gpu_worker.residency.manager import FILE_CHECK_S
from gpu_worker.residency.models import ModelState
from gpu_worker.residency.policy import SHORTAGE_WAIT_S
from gpu_worker.transport import PeerGone, TransportFailed
from gpu_worker.worker import Drain, Wake
from shared.pcm import SAMPLE_RATE
from shared.protocol import (
    VERSION,
    Audio,
    Cleanup,
    CloneVoice,
    Counters,
    Credit,
    DesignVoice,
    Failed,
    Finished,
    Hello,
    LoadModel,
    Ping,
    Pong,
    Sampling,
    Started,
    UnloadModel,
    Usage,
    Welcome,
)
from tests.gpu_worker.fake_engines import VOICE, WEB, WorkerBench, pcm_of
from tests.gpu_worker.fakes import FakeDevice, a_spec

OTHER = b"web-2"

MakeBench = Callable[..., WorkerBench]


def _loaded(bench: WorkerBench, *models: str) -> WorkerBench:
    """The models have spoken once, and everything said about that is forgotten."""
    for model in models or ("m",):
        bench.speak(f"first-{model}", "hello", model=model)
    bench.settle()
    bench.sent.clear()
    return bench


class TestSpeaking:
    """From a Speak to its last word."""

    def test_order_of_messages(self, bench: WorkerBench) -> None:
        """Started, then every piece with its number and no gap, then Finished, and nothing after it."""
        bench.speak("r", "one two three")
        bench.settle()
        messages = bench.heard("r")
        assert messages[:-1] == [
            Started(id="r", model="m", sample_rate=SAMPLE_RATE),
            Audio(id="r", seq=0),
            Audio(id="r", seq=1),
            Audio(id="r", seq=2),
        ]
        assert isinstance(messages[-1], Finished)
        assert (messages[-1].reason, messages[-1].usage) == ("stop", Usage(input_tokens=3, output_tokens=6))
        assert [payload for _, message, payload in bench.sent if isinstance(message, Audio)] == [
            pcm_of("one"),
            pcm_of("two"),
            pcm_of("three"),
        ]
        assert bench.references() == {"m": 0}

    def test_everything_reaches_the_engine(self, bench: WorkerBench) -> None:
        """What the web worker resolved is what the engine is asked for."""
        sampling = Sampling(seed=7, max_new_tokens=3)
        bench.speak(
            "r",
            "one",
            task="CustomVoice",
            voice="vivian",
            language="german",
            instructions="softly",
            sampling=sampling,
            non_streaming_mode=True,
        )
        bench.settle()
        (job,) = bench.engines["m"].admitted
        assert (job.task, job.text, job.voice, job.language) == ("CustomVoice", "one", "vivian", "german")
        assert (job.instructions, job.sampling, job.non_streaming_mode) == ("softly", sampling, True)
        assert job.reference is None

    def test_recording_of_the_request(self, bench: WorkerBench) -> None:
        """A recording that came with the request is its reference, transcript and all."""
        bench.speak("r", "one", payload=b"\1\0\2\0", reference_text="what it says")
        bench.speak("x", "one", payload=b"\1\0\2\0", x_vector_only=True)
        bench.settle()
        first, second = (job.reference for job in bench.engines["m"].admitted)
        assert first is not None
        assert second is not None
        assert (first.pcm, first.text, first.x_vector_only) == (b"\1\0\2\0", "what it says", False)
        assert second.x_vector_only
        assert first.key != second.key

    def test_saved_voice(self, bench: WorkerBench) -> None:
        """A saved voice is the reference, and no preset voice is named beside it."""
        voice = bench.save_voice("Mine", text="what it says")
        bench.speak("r", "one", voice=voice.id, saved_voice=True)
        bench.speak("x", "one", voice="voice_none", saved_voice=True)
        bench.settle()
        (job,) = bench.engines["m"].admitted
        assert job.voice == ""
        assert job.reference is not None
        assert (job.reference.pcm, job.reference.text) == (VOICE, "what it says")
        assert (bench.answer("x").code, bench.answer("x").param) == ("voice_not_found", "voice")

    def test_saved_voice_without_its_words(self, bench: WorkerBench) -> None:
        """A saved voice can be cloned from its embedding alone; the engine does not take one for the other."""
        voice = bench.save_voice("Mine", text="what it says")
        other = bench.save_voice("Other")
        for name, given, alone in (("r", voice, False), ("s", voice, True), ("t", other, True), ("u", other, False)):
            bench.speak(name, "one", voice=given.id, saved_voice=True, x_vector_only=alone)
        bench.settle()
        references = [job.reference for job in bench.engines["m"].admitted]
        assert [reference.x_vector_only for reference in references if reference] == [False, True, True, True]
        keys = [reference.key for reference in references if reference]
        assert len(set(keys)) == 3
        assert keys[2] == keys[3]

    def test_side_by_side(self, bench: WorkerBench) -> None:
        """Requests of several web workers speak at once, a piece each in every step, and are never mixed up."""
        _loaded(bench)
        bench.speak("r", "a b c")
        bench.speak("r", "x y z", peer=OTHER)
        bench.turn()
        assert (bench.words("r"), bench.words("r", OTHER)) == ("a", "x")
        bench.settle()
        assert (bench.words("r"), bench.words("r", OTHER)) == ("a b c", "x y z")
        assert bench.kinds("r", OTHER)[-1] == "Finished"

    def test_two_models(self, make_bench: MakeBench) -> None:
        """While one model is brought to the device, another goes on speaking."""
        bench = _loaded(make_bench({"m": 100, "n": 100}))
        bench.gate.clear()
        bench.speak("r", "one two three")
        bench.speak("s", "four", model="n")
        bench.turn(4)
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Audio", "Finished"]
        assert bench.kinds("s") == []
        assert bench.states()["n"] == "loading"
        bench.gate.set()
        bench.settle()
        assert bench.words("s") == "four"

    def test_id_in_use(self, bench: WorkerBench) -> None:
        """A second request by the same name is refused and does not disturb the first; afterwards the name is free."""
        _loaded(bench)
        bench.speak("r", "one two")
        bench.speak("r", "three")
        bench.settle()
        assert sorted(bench.kinds("r")) == ["Audio", "Audio", "Failed", "Finished", "Started"]
        assert bench.words("r") == "one two"
        assert bench.references() == {"m": 0}
        bench.speak("r", "four")
        bench.settle()
        assert bench.words("r") == "one two four"

    def test_timings(self, bench: WorkerBench) -> None:
        """Where the time went: the load is part of the wait, the first piece comes behind it, the total is the end."""
        bench.load_s = 2.0
        bench.speak("r", "one two three")
        while not bench.engines or bench.is_moving:
            bench.turn()
        bench.clock.advance(0.5)
        bench.engines["m"].step_s = 0.25
        bench.settle()
        timings = bench.answer("r").timings
        assert timings.load_s == pytest.approx(2.0)
        assert timings.queue_s == pytest.approx(2.0)
        # The first step was in the turn that took the load's report, before the engine was slowed down.
        assert timings.first_audio_s == pytest.approx(2.0)
        assert timings.total_s == pytest.approx(2.0 + 0.5 + 2 * 0.25)

    def test_timings_of_a_wait_for_a_slot(self, make_bench: MakeBench) -> None:
        """Waiting for others is waiting, but not loading."""
        bench = _loaded(make_bench(slots=1))
        bench.engines["m"].step_s = 1.0
        bench.speak("r", "one two three")
        bench.speak("s", "four")
        bench.settle()
        timings = bench.answer("s").timings
        assert (timings.load_s, timings.queue_s) == (0.0, pytest.approx(3.0))
        assert (timings.first_audio_s, timings.total_s) == (pytest.approx(4.0), pytest.approx(4.0))


class TestRefusals:
    """Requests that are not even queued."""

    def test_unknown_model(self, bench: WorkerBench) -> None:
        """A model that there is not is named, with those that there are."""
        bench.speak("r", "one", model="nonesuch")
        bench.settle()
        (failed,) = bench.heard("r")
        assert (failed.code, failed.param) == ("model_not_found", "model")
        assert "'nonesuch'" in failed.message
        assert "there are m" in failed.message
        assert bench.snapshot().requests == Counters(rejected=1)

    def test_unavailable_model(self, bench: WorkerBench) -> None:
        """What is missing is said, and looked at again at the next request."""
        bench.files.problems["m"] = "its weights are not there"
        bench.speak("r", "one")
        bench.settle()
        (failed,) = bench.heard("r")
        assert (failed.code, failed.message) == ("model_unavailable", "m: its weights are not there")
        assert failed.retry_after_s is not None
        assert bench.states() == {"m": "unavailable"}
        bench.files.problems.clear()
        bench.speak("s", "one")
        bench.settle()
        assert bench.words("s") == "one"

    def test_queue_full(self, make_bench: MakeBench) -> None:
        """One request too many is told when to come back; those that wait are served."""
        bench = _loaded(make_bench(slots=1, max_queue=2))
        for name in "abcd":
            bench.speak(name, "one two")
        bench.settle()
        (failed,) = bench.heard("d")
        assert failed.code == "queue_full"
        assert failed.retry_after_s >= 1
        assert "2 requests are waiting already" in failed.message
        assert [bench.kinds(name)[-1] for name in "abc"] == ["Finished"] * 3
        assert bench.snapshot().requests == Counters(started=4, finished=4, rejected=1)

    def test_engine_refuses_a_job(self, bench: WorkerBench) -> None:
        """What an engine will not take fails by itself; its neighbours speak."""
        _loaded(bench)
        bench.engines["m"].admit_troubles.append(JobError("voice_not_found", "no such voice", param="voice"))
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        assert bench.heard("r") == [Failed(id="r", code="voice_not_found", message="no such voice", param="voice")]
        assert bench.words("s") == "two"
        assert bench.references() == {"m": 0}

    def test_engine_breaks_taking_a_job(self, bench: WorkerBench) -> None:
        """An engine that breaks while it takes a job costs that job and nothing else."""
        _loaded(bench)
        bench.engines["m"].admit_troubles.append(KeyError("klingon"))
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        assert [message.code for message in bench.heard("r")] == ["synthesis_failed"]
        assert bench.words("s") == "two"

    def test_the_disk_is_left_to_others(self, bench: WorkerBench) -> None:
        """Looking at files, before a load and for an absent model's sake, is never this thread's work."""
        bench.files.problems["m"] = "its weights are not there"
        for name in "rs":
            bench.speak(name, "one")
            bench.settle()
        assert bench.files.threads["problem_of"] == {"check-files"}


class TestQueue:
    """Who is next."""

    def test_clients_take_turns(self, make_bench: MakeBench) -> None:
        """A client with many requests delays another by one of them, not by all."""
        bench = _loaded(make_bench(slots=1))
        for name in ("a1", "a2", "a3"):
            bench.speak(name, "word", client="alice")
        bench.speak("b1", "word", client="bob")
        bench.settle()
        order = [message.id for _, message, _ in bench.sent if isinstance(message, Started)]
        assert order == ["a1", "a2", "b1", "a3"]

    def test_bound_over_all_models(self, make_bench: MakeBench) -> None:
        """No more requests than max_concurrency hold a slot, however many slots the engines have."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, slots=4, max_concurrency=3), "m", "n")
        for index in range(3):
            bench.speak(f"m{index}", "one two three")
            bench.speak(f"n{index}", "one two three", model="n")
        bench.turn()
        snapshot = bench.snapshot()
        assert (snapshot.running, snapshot.queued, snapshot.slots) == (3, 3, 3)
        bench.settle()
        assert bench.snapshot().requests.finished == 2 + 6

    def test_full_model_holds_up_no_other(self, make_bench: MakeBench) -> None:
        """A request for a model without a free slot does not stand in the way of one for another model."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, slots=1), "m", "n")
        bench.speak("a", "one two three")
        bench.speak("b", "one two three")
        bench.speak("c", "one", model="n")
        bench.turn()
        assert bench.kinds("c") == ["Started", "Audio", "Finished"]
        assert bench.kinds("b") == []


class TestCredit:
    """Never more under way than the web worker can take."""

    def test_no_more_than_credit(self, bench: WorkerBench) -> None:
        """The pieces stop where the credit ends, and go on with the next; Finished waits behind the last."""
        _loaded(bench)
        bench.speak("r", "a b c d e", credit=2)
        bench.settle()
        assert bench.words("r") == "a b"
        bench.credit("r", 1)
        bench.settle()
        assert bench.words("r") == "a b c"
        bench.credit("r", 10)
        bench.settle()
        assert bench.words("r") == "a b c d e"
        assert bench.kinds("r")[-2:] == ["Audio", "Finished"]
        assert bench.snapshot().running == 0

    def test_credit_for_exactly_all(self, bench: WorkerBench) -> None:
        """Finished needs no credit of its own."""
        _loaded(bench)
        bench.speak("r", "a b", credit=2)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Finished"]

    def test_stalled_alone(self, bench: WorkerBench) -> None:
        """A request whose reader does not read holds up no other, and its engine does not run ahead of it."""
        _loaded(bench)
        bench.speak("slow", "a b c", credit=0)
        bench.speak("fast", "x y z")
        bench.settle()
        assert bench.kinds("slow") == ["Started"]
        assert bench.words("fast") == "x y z"
        steps = bench.engines["m"].steps
        bench.turn(5)
        assert bench.engines["m"].steps == steps
        bench.credit("slow", 3)
        bench.settle()
        assert bench.words("slow") == "a b c"

    def test_credit_for_nobody(self, bench: WorkerBench) -> None:
        """Credit for a request that ended, or never was, is nothing to anybody; negative credit takes none away."""
        _loaded(bench)
        bench.speak("r", "a b c", credit=1)
        bench.credit("r", -5)
        bench.credit("nobody", 3)
        bench.credit("r", 2)
        bench.settle()
        bench.credit("r", 3)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Audio", "Finished"]

    def test_stall_timeout(self, make_bench: MakeBench) -> None:
        """A reader that takes nothing for so long loses its slot, and hears why."""
        bench = _loaded(make_bench(slots=1, stall_timeout_s=10))
        bench.speak("slow", "a b c", credit=1)
        bench.speak("next", "x")
        bench.settle()
        bench.clock.advance(9)
        bench.turn()
        assert bench.kinds("slow") == ["Started", "Audio"]
        bench.clock.advance(2)
        bench.settle()
        assert bench.answer("slow").code == "client_too_slow"
        assert bench.words("next") == "x"
        assert bench.references() == {"m": 0}

    def test_reading_a_little_is_enough(self, make_bench: MakeBench) -> None:
        """The time begins again whenever something was taken."""
        bench = _loaded(make_bench(stall_timeout_s=10))
        bench.speak("slow", "a b c", credit=0)
        for _ in range(3):
            bench.settle()
            bench.clock.advance(9)
            bench.credit("slow", 1)
        bench.settle()
        assert bench.kinds("slow")[-1] == "Finished"

    def test_waiting_in_the_queue_is_no_stall(self, make_bench: MakeBench) -> None:
        """A queued request, which could not have read anything, is not ended for that."""
        bench = make_bench(stall_timeout_s=10)
        bench.gate.clear()
        bench.speak("r", "a", credit=0)
        bench.turn(2)
        bench.clock.advance(60)
        bench.turn(2)
        assert bench.kinds("r") == []
        bench.gate.set()
        bench.settle()
        bench.credit("r", 1)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Finished"]


class _TwoAtOnce:
    """An engine's habit: the last piece comes in two, whatever the credit."""

    def __init__(self, bench: WorkerBench) -> None:
        engine = bench.engines["m"]
        step = engine.step

        def doubled(stalled: Any) -> list[Any]:
            events = step(stalled)
            return [events[0], *events] if len(events) == 2 else events

        engine.step = doubled  # type: ignore[method-assign] # the one habit that differs


class TestSaidInFull:
    """A request that the engine is done with, but that has not been read to its end."""

    def _ahead(self, bench: WorkerBench) -> WorkerBench:
        _loaded(bench)
        _TwoAtOnce(bench)
        bench.speak("r", "a b", credit=2)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio"]
        assert bench.snapshot().running == 0
        return bench

    def test_finished_waits(self, bench: WorkerBench) -> None:
        """The slot is free already; the last piece and Finished come with the credit."""
        self._ahead(bench)
        bench.credit("r", 1)
        bench.settle()
        assert bench.kinds("r")[2:] == ["Audio", "Audio", "Finished"]
        assert [message.seq for message in bench.heard("r") if isinstance(message, Audio)] == [0, 1, 2]

    def test_cancelled(self, bench: WorkerBench) -> None:
        """Cancelled then, it is forgotten, counted once, and a later credit brings nothing."""
        self._ahead(bench)
        bench.cancel("r")
        bench.credit("r", 5)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio"]
        assert bench.snapshot().requests == Counters(started=2, finished=2)
        assert bench.references() == {"m": 0}

    def test_never_read(self, bench: WorkerBench) -> None:
        """Never read, it is given up like any other."""
        self._ahead(bench)
        bench.clock.advance(61)
        bench.turn()
        assert bench.answer("r").code == "client_too_slow"
        assert bench.references() == {"m": 0}

    def test_holds_up_the_end(self, bench: WorkerBench) -> None:
        """A worker told to end waits for it, but no longer than it may, and says so."""
        self._ahead(bench)
        bench.inbox.put(Drain(5))
        bench.turn(3)
        bench.clock.advance(6)
        bench.worker.run()
        assert bench.answer("r").code == "shutting_down"


class TestCancel:
    """Nobody listens any more."""

    def test_speaking(self, make_bench: MakeBench) -> None:
        """The slot is free before the next step, and another request has it in the same turn."""
        bench = _loaded(make_bench(slots=1))
        bench.speak("r", "a b c")
        bench.speak("s", "x y")
        bench.turn()
        bench.cancel("r")
        bench.turn()
        assert bench.words("r") == "a"
        assert bench.words("s") == "x"
        assert bench.engines["m"].jobs == {"x y"}
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio"]
        assert bench.snapshot().requests == Counters(started=3, finished=2, cancelled=1)

    def test_queued(self, make_bench: MakeBench) -> None:
        """A cancelled request never starts and is never heard of."""
        bench = _loaded(make_bench(slots=1))
        bench.speak("r", "a b c")
        bench.speak("s", "x y")
        bench.turn()
        bench.cancel("s")
        bench.settle()
        assert bench.kinds("s") == []
        assert bench.snapshot().queued == 0
        assert bench.references() == {"m": 0}

    def test_waiting_for_a_model(self, bench: WorkerBench) -> None:
        """Cancelled while its model is brought: the model arrives, and nobody speaks."""
        bench.gate.clear()
        bench.speak("r", "a")
        bench.turn(2)
        bench.cancel("r")
        bench.turn(2)
        bench.gate.set()
        bench.settle()
        assert bench.kinds("r") == []
        assert bench.engines["m"].admitted == []
        assert bench.references() == {"m": 0}

    def test_too_late_twice_or_for_nobody(self, bench: WorkerBench) -> None:
        """It is idempotent, and nobody is told."""
        _loaded(bench)
        bench.speak("r", "a b c")
        bench.turn()
        for name in ("r", "r", "nobody"):
            bench.cancel(name)
        bench.settle()
        bench.speak("s", "x")
        bench.settle()
        bench.cancel("s")
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio"]
        assert bench.kinds("s") == ["Started", "Audio", "Finished"]
        assert bench.snapshot().requests == Counters(started=3, finished=2, cancelled=1)

    def test_only_ones_own(self, bench: WorkerBench) -> None:
        """A web worker cancels its own request, not another's by the same name."""
        _loaded(bench)
        bench.speak("r", "a b c")
        bench.cancel("r", peer=OTHER)
        bench.settle()
        assert bench.kinds("r")[-1] == "Finished"

    def test_peer_gone(self, make_bench: MakeBench) -> None:
        """With a web worker goes everything it asked for, queued and speaking; the others' requests stay."""
        bench = _loaded(make_bench(slots=2))
        bench.speak("r1", "a b c")
        bench.speak("r2", "a b c", credit=0)
        bench.speak("r3", "a b c")
        bench.speak("s", "x y z", peer=OTHER)
        bench.turn()
        bench.inbox.put(PeerGone(WEB))
        bench.turn()
        assert bench.engines["m"].jobs == {"x y z"}
        bench.settle()
        assert bench.words("s", OTHER) == "x y z"
        snapshot = bench.snapshot()
        assert (snapshot.running, snapshot.queued) == (0, 0)
        assert snapshot.requests == Counters(started=4, finished=2, cancelled=3)
        assert bench.references() == {"m": 0}
        bench.inbox.put(PeerGone(WEB))
        bench.settle()


class TestFaults:
    """What breaks, and what goes on."""

    def test_one_job(self, bench: WorkerBench) -> None:
        """A job's own trouble fails that job with the engine's words; its neighbour speaks to the end."""
        _loaded(bench)
        bench.speak("r", "one fault never")
        bench.speak("s", "x y z")
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Failed"]
        assert (bench.answer("r").code, bench.answer("r").param) == ("invalid_audio", "ref_audio")
        assert bench.words("s") == "x y z"
        assert bench.snapshot().requests == Counters(started=3, finished=2, failed=1)
        assert bench.references() == {"m": 0}

    def test_afterthought(self, bench: WorkerBench) -> None:
        """What an engine still says for a job that was cancelled is heard by nobody."""
        _loaded(bench)
        bench.speak("r", "a b c")
        bench.speak("s", "x y z")
        bench.turn()
        gone = next(job.id for job in bench.engines["m"].admitted if job.text == "a b c")
        step = bench.engines["m"].step
        bench.engines["m"].step = lambda stalled: [Pcm(gone, b"late"), *step(stalled)]  # type: ignore[method-assign] # a pipeline's habit
        bench.cancel("r")
        bench.settle()
        assert bench.words("r") == "a"
        assert bench.words("s") == "x y z"

    def test_one_engine(self, make_bench: MakeBench) -> None:
        """A broken engine costs its own requests; others speak on, and the next request gets a fresh engine."""
        bench = _loaded(make_bench({"m": 100, "n": 100}), "m", "n")
        bench.engines["m"].step_troubles.extend([None, ValueError("lost my place")])
        bench.speak("r", "a b c")
        bench.speak("s", "a b c", credit=0)
        bench.speak("t", "x y z", model="n")
        bench.settle()
        for name in "rs":
            assert bench.answer(name).code == "synthesis_failed"
            assert "lost my place" in bench.answer(name).message
        assert bench.words("t") == "x y z"
        assert bench.states() == {"m": "absent", "n": "resident"}
        bench.speak("u", "again")
        bench.settle()
        assert bench.words("u") == "again"
        assert len(bench.opened) == 3

    def test_one_engine_with_others_waiting(self, make_bench: MakeBench) -> None:
        """Requests still queued for a broken engine wait for a fresh one; they did not break it."""
        bench = _loaded(make_bench(slots=1))
        broken = bench.engines["m"]
        broken.step_troubles.extend([ValueError("lost my place")] * 9)
        for index in range(5):
            bench.speak(f"r{index}", "x y z")
        bench.turn()
        assert bench.states() == {"m": "absent"}
        bench.speak("late", "a b")
        bench.settle()
        assert bench.answer("r0").code == "synthesis_failed"
        assert [bench.words(f"r{index}") for index in range(1, 5)] == ["x y z"] * 4
        assert bench.words("late") == "a b"
        assert (broken.state, broken.steps, len(bench.opened)) == (ModelState.ABSENT, 4 + 1 - 3, 2)

    def test_broken_while_another_loads(self, make_bench: MakeBench) -> None:
        """A broken engine takes nobody while it waits to be dropped, and is asked for by hand like an absent model."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, slots=1))
        bench.gate.clear()
        bench.speak("n", "one", model="n")
        bench.settle()
        bench.engines["m"].step_troubles.append(ValueError("lost my place"))
        bench.speak("r", "a b c")
        bench.speak("s", "x y z")
        bench.settle()
        assert (bench.kinds("r"), bench.kinds("s")) == (["Started", "Failed"], [])
        assert bench.states() == {"m": "loading", "n": "loading"}
        bench.cancel("s")
        bench.call("c", LoadModel(model="m"))
        bench.settle()
        assert bench.heard("c") == []
        bench.gate.set()
        bench.settle()
        assert bench.answer("c").model.state == "resident"
        assert (len(bench.opened), bench.words("n")) == (3, "one")

    def test_broken_device(self, make_bench: MakeBench) -> None:
        """A device that is lost to this process ends it, after everybody has heard."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, slots=1), "m", "n")
        bench.engines["m"].step_troubles.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
        bench.speak("r", "a b")
        bench.speak("queued", "a b")
        bench.speak("t", "x y z", model="n", credit=0)
        with pytest.raises(BrokenDeviceError):
            bench.worker.run()
        for name in ("r", "queued", "t"):
            assert bench.answer(name).code == "synthesis_failed"
            assert bench.answer(name).message.startswith("the device of the GPU worker broke")
            assert bench.kinds(name).count("Failed") == 1

    def test_broken_device_taking_a_job(self, bench: WorkerBench) -> None:
        """Also where it shows while a job is taken."""
        _loaded(bench)
        bench.engines["m"].admit_troubles.append(RuntimeError("CUDA error: device-side assert triggered"))
        bench.speak("r", "a b")
        with pytest.raises(BrokenDeviceError):
            bench.worker.run()
        assert bench.kinds("r") == ["Failed"]

    def test_loader_has_ended(self, bench: WorkerBench) -> None:
        """A process that can move no model any more ends, after everybody has heard."""
        _loaded(bench)
        bench.speak("r", "a b c")
        bench.inbox.put(MoverFailed("CUDA error: device-side assert triggered"))
        with pytest.raises(BrokenDeviceError, match="device-side assert"):
            bench.worker.run()
        assert bench.answer("r").code == "synthesis_failed"

    def test_whatever_ends_it(self, make_bench: MakeBench) -> None:
        """A fault that nobody foresaw ends the process, after everybody has heard, whatever else it has broken."""
        designer = msgspec.structs.replace(a_spec("designer"), task="VoiceDesign")
        bench = _loaded(make_bench(specs=[a_spec("m"), designer], slots=1))
        bench.disk.gate.clear()
        bench.gate.clear()
        bench.speak("speaking", "a b c", credit=1)
        bench.speak("queued", "a b c", peer=OTHER)
        bench.call("load", LoadModel(model="designer"))
        bench.call("design", DesignVoice(name="Ada", prompt="p"))
        bench.call("clone", CloneVoice(name="Bob"), VOICE)
        bench.settle()
        lost = _lost("the GPU is lost")
        bench.device.host = lost  # type: ignore[method-assign] # the memory probe, which every pong asks
        bench.engines["m"].cancel = lost  # type: ignore[method-assign] # what a request's end asks for
        bench.tell(Ping())
        with pytest.raises(OSError, match="the GPU is lost"):
            bench.worker.run()
        names = {"speaking": WEB, "queued": OTHER, "load": WEB, "design": WEB, "clone": WEB}
        for name, peer in names.items():
            (failed,) = [message for message in bench.heard(name, peer) if isinstance(message, Failed)]
            assert failed.code == "synthesis_failed"
            assert failed.message.startswith("the GPU worker broke: OSError: the GPU is lost")

    @pytest.mark.parametrize("defect", ["acquire", "release"])
    def test_the_request_at_which_it_ends(
        self, bench: WorkerBench, monkeypatch: pytest.MonkeyPatch, defect: str
    ) -> None:
        """The request hears of it, too, at whose coming or end it happened."""
        _loaded(bench)
        monkeypatch.setattr(bench.residency, defect, _lost("no such account"))
        bench.speak("r", "a")
        with pytest.raises(OSError, match="no such account"):
            bench.worker.run()
        assert bench.kinds("r").count("Failed") == 1
        assert bench.kinds("r")[-1] == "Failed"

    def test_unreachable(self, bench: WorkerBench) -> None:
        """Without its socket the process is of no use to anybody, and ends."""
        bench.inbox.put(TransportFailed("the socket is gone"))
        with pytest.raises(RuntimeError, match="the socket is gone"):
            bench.turn()

    def test_woken(self, bench: WorkerBench) -> None:
        """Who wakes the loop ends its wait for a command, and asks for nothing."""
        bench.inbox.put(Wake())
        bench.turn()
        assert bench.inbox.empty()
        assert bench.sent == []

    def test_not_a_command(self, bench: WorkerBench) -> None:
        """What is no command is a defect of ours, and not passed over."""
        bench.inbox.put("hello")
        with pytest.raises(TypeError, match="hello"):
            bench.turn()


def _lost(message: str) -> Callable[..., Any]:
    """Something that does not work any more."""

    def lost(*_arguments: object) -> Any:
        raise OSError(message)

    return lost


class TestOutOfMemory:
    """The device's memory runs out in a step."""

    def test_room_is_made_and_the_step_repeated(self, make_bench: MakeBench) -> None:
        """Idle models leave, the step is tried once more, and nobody notices."""
        bench = _loaded(make_bench({"m": 100, "n": 100}), "m", "n")
        bench.engines["m"].step_troubles.extend([None, MemoryError("full")])
        bench.speak("r", "a b c")
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Audio", "Finished"]
        assert bench.states() == {"m": "resident", "n": "offloaded"}

    def test_youngest_goes(self, bench: WorkerBench) -> None:
        """Where that does not help, the youngest request goes, alone, and the others go on."""
        _loaded(bench)
        bench.speak("old", "a b c")
        bench.turn()
        bench.clock.advance(1)
        bench.engines["m"].step_troubles.extend([None, MemoryError("full"), MemoryError("still full")])
        bench.speak("young", "x y z")
        bench.settle()
        assert bench.kinds("young") == ["Started", "Audio", "Failed"]
        assert bench.answer("young").code == "insufficient_vram"
        assert bench.answer("young").retry_after_s is not None
        assert bench.words("old") == "a b c"
        assert bench.kinds("old")[-1] == "Finished"

    def test_last_one_goes(self, bench: WorkerBench) -> None:
        """A request that cannot be done by itself fails, and the model serves the next."""
        _loaded(bench)
        bench.engines["m"].step_troubles.extend([MemoryError("full"), MemoryError("full")])
        bench.speak("r", "a b c")
        bench.settle()
        assert bench.answer("r").code == "insufficient_vram"
        bench.speak("s", "x")
        bench.settle()
        assert bench.words("s") == "x"

    def test_cancelled_meanwhile(self, bench: WorkerBench) -> None:
        """The request that met it is cancelled before the second try: the model serves the next all the same."""
        _loaded(bench)
        bench.engines["m"].step_troubles.append(MemoryError("full"))
        bench.speak("r", "a b c")
        bench.turn()
        bench.cancel("r")
        bench.turn()
        bench.speak("s", "x")
        bench.settle()
        assert bench.words("s") == "x"

    def test_others_speak_meanwhile(self, make_bench: MakeBench) -> None:
        """While idle models leave, the model in need is left alone and nothing starts; another model speaks."""
        bench = _loaded(make_bench({"m": 100, "n": 100, "idle": 100}), "m", "n", "idle")
        bench.engines["m"].step_troubles.append(MemoryError("full"))
        bench.speak("r", "a b c")
        bench.speak("t", "x y z", model="n")
        bench.turn()
        bench.loses_transitions = True
        bench.residency.advance()  # the eviction begins and does not end
        steps = bench.engines["m"].steps
        bench.speak("s", "d")
        bench.turn(3)
        assert bench.words("t") == "x y z"
        assert bench.engines["m"].steps == steps
        assert bench.kinds("s") == []

    @pytest.mark.parametrize(("troubles", "last"), [(1, "Finished"), (2, "Failed")])
    def test_nobody_waits_for_a_load(self, make_bench: MakeBench, troubles: int, last: str) -> None:
        """While a model is on its way nothing can be evicted: the step is tried again at once, whatever comes of it.

        The others of the model in need speak on; idle models leave when the load has ended.
        """
        bench = _loaded(make_bench({"m": 100, "n": 100, "idle": 100}), "m", "idle")
        bench.speak("old", "a b c d")
        bench.turn()
        bench.clock.advance(1)
        bench.gate.clear()
        bench.speak("n", "x", model="n")
        bench.settle()
        assert bench.states()["n"] == "loading"
        bench.engines["m"].step_troubles.extend([MemoryError("full")] * troubles)
        bench.speak("young", "a b c")
        bench.turn(6)
        assert bench.words("old") == "a b c d"
        assert bench.kinds("young")[-1] == last
        bench.gate.set()
        bench.settle()
        assert bench.states() == {"m": "resident", "n": "resident", "idle": "offloaded"}

    def test_taking_a_job(self, make_bench: MakeBench) -> None:
        """A job for which there is no memory waits until idle models have left, and keeps its place."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, slots=1), "m", "n")
        bench.engines["m"].admit_troubles.append(MemoryError("full"))
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        assert (bench.words("r"), bench.words("s")) == ("one", "two")
        assert [job.text for job in bench.engines["m"].admitted[1:]] == ["one", "two"]
        assert bench.states() == {"m": "resident", "n": "offloaded"}

    def test_taking_a_job_in_vain(self, bench: WorkerBench) -> None:
        """Tried twice, it fails alone, and with a time to come back."""
        _loaded(bench)
        bench.engines["m"].admit_troubles.extend([MemoryError("full"), MemoryError("full")])
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        assert [message.code for message in bench.heard("r")] == ["insufficient_vram"]
        assert bench.answer("r").retry_after_s is not None
        assert bench.words("s") == "two"
        assert bench.references() == {"m": 0}

    def test_cancelled_while_its_turn_waits(self, make_bench: MakeBench) -> None:
        """A job that waits for its second try can be given up like any other that is queued."""
        bench = _loaded(make_bench({"m": 100, "n": 100}), "m", "n")
        bench.engines["m"].admit_troubles.append(MemoryError("full"))
        bench.speak("r", "one")
        bench.turn()
        bench.cancel("r")
        bench.settle()
        assert bench.heard("r") == []
        assert bench.references() == {"m": 0, "n": 0}


class TestModels:
    """Loads, evictions and measurements as requests see them."""

    def test_load_fails(self, bench: WorkerBench) -> None:
        """Who waits for a load that fails hears why, and the next request tries again."""
        bench.open_troubles["m"] = [OSError("the disk is gone")]
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        for name in "rs":
            (failed,) = bench.heard(name)
            assert failed.code == "model_unavailable"
            assert "the disk is gone" in failed.message
        assert bench.references() == {"m": 0}
        bench.speak("t", "three")
        bench.settle()
        assert bench.words("t") == "three"

    def test_load_runs_out_of_memory(self, make_bench: MakeBench) -> None:
        """A load that runs out of memory is tried once more without the idle models, and the request only waits."""
        bench = _loaded(make_bench({"m": 100, "n": 100}))
        bench.open_troubles["n"] = [MemoryError("full")]
        bench.speak("r", "x", model="n")
        bench.settle()
        assert bench.words("r") == "x"
        assert bench.states() == {"m": "offloaded", "n": "resident"}

    def test_preloaded(self, make_bench: MakeBench) -> None:
        """The models of the start come without being asked for; what is still to come, or failed to, is told."""
        bench = make_bench({"m": 100, "n": 100, "o": 100}, preload=("m", "n"))
        bench.open_troubles["n"] = [OSError("the disk is gone")]
        assert bench.snapshot().preloading == ["m", "n"]
        bench.settle()
        assert bench.snapshot().preloading == []
        assert bench.states() == {"m": "resident", "n": "absent", "o": "absent"}

    def test_a_preload_that_finds_no_room(self, make_bench: MakeBench) -> None:
        """The first of the start's models stays; the next is refused, which the snapshot and the log tell."""
        bench = make_bench({"n": 100, "m": 100}, preload=("m", "n"), device=FakeDevice(budget_bytes=150))
        with capture_logs() as logs:
            bench.settle()
        snapshot = bench.snapshot()
        assert snapshot.preloading == []
        n, m = snapshot.models
        assert (m.state, n.state) == ("resident", "absent")
        assert "n needs" in n.detail
        (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
        assert (warning["model"], "n needs" in warning["reason"]) == ("n", True)

    def test_a_refused_unload_does_not_end_the_wait_for_a_preload(self, make_bench: MakeBench) -> None:
        """A model that stays because it has a request is still to come."""
        bench = make_bench({"m": 100}, preload=("m",))
        bench.gate.clear()
        bench.speak("r", "a")
        bench.call("c", UnloadModel(model="m"))
        bench.settle()
        assert bench.answer("c").code == "model_busy"
        assert bench.snapshot().preloading == ["m"]

    def test_unloading_ends_the_wait_for_a_preload(self, make_bench: MakeBench) -> None:
        """A model that was to be preloaded and is unloaded by hand before is not waited for any longer."""
        bench = make_bench({"m": 100}, preload=("m",))
        bench.call("c", UnloadModel(model="m"))
        bench.settle()
        assert bench.snapshot().preloading == []

    def test_moves_are_logged(self, bench: WorkerBench) -> None:
        """What was moved, how long it took, and what the process held before and after."""
        with capture_logs() as logs:
            _loaded(bench)
        (moved,) = [entry for entry in logs if entry["event"] == "transition_done"]
        assert (moved["model"], moved["kind"], moved["log_level"]) == ("m", "load", "info")
        assert {"seconds", "before_mb", "after_mb"} <= moved.keys()

    def test_a_download_holds_up_nobody(self, make_bench: MakeBench) -> None:
        """While a model is fetched others are loaded, moved by hand and cleaned away; its requests wait.

        It is "loading", and how far the download has come stands in the snapshot until it has ended.
        """
        bench = _loaded(make_bench({"m": 100, "n": 100, "far": 100}, idle_timeout_s=10))
        bench.files.remote.add("far")
        bench.files.gate.clear()
        bench.speak("r", "one", model="far")
        bench.settle()
        bench.inbox.put(Progress(model="far", detail="fetching file 3 of 9"))
        bench.speak("s", "two", model="n")
        bench.settle()
        assert (bench.words("s"), bench.kinds("r")) == ("two", [])
        far = bench.snapshot().models[2]
        assert (far.state, far.detail) == ("loading", "fetching file 3 of 9")
        bench.call("unload", UnloadModel(model="m"))
        bench.settle()
        assert bench.answer("unload").model.state == "absent"
        bench.clock.advance(11)
        bench.call("clean", Cleanup())
        bench.settle()
        assert bench.answer("clean").cleanup.models_unloaded == ["n"]
        bench.files.gate.set()
        bench.settle()
        assert bench.words("r") == "one"
        assert bench.snapshot().models[2].detail == ""
        assert bench.files.threads["fetch"] == {"download"}

    def test_a_download_that_fails(self, bench: WorkerBench) -> None:
        """Who waits for the model hears why, the model's entry tells it until a load works, and the next may try."""
        bench.files.remote.add("m")
        bench.files.fetch_troubles["m"] = [JobError("model_unavailable", "the hub is out of reach")]
        bench.speak("r", "one")
        bench.call("c", LoadModel(model="m"))
        bench.settle()
        for name in "rc":
            (failed,) = bench.heard(name)
            assert (failed.code, failed.message) == ("model_unavailable", "the hub is out of reach")
            assert failed.retry_after_s is not None
        (model,) = bench.snapshot().models
        assert (model.state, model.detail) == ("absent", "the hub is out of reach")
        bench.speak("s", "two")
        bench.settle()
        assert bench.words("s") == "two"
        assert bench.snapshot().models[0].detail == ""

    def test_weights_that_come_and_go(self, bench: WorkerBench) -> None:
        """What is copied in or deleted shows within seconds, though nobody asks for the model."""
        bench.files.problems["m"] = "its weights are not there"
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        (model,) = bench.snapshot().models
        assert (model.state, model.detail) == ("unavailable", "its weights are not there")
        bench.files.problems.clear()
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        (model,) = bench.snapshot().models
        assert (model.state, model.detail) == ("absent", "")

    def test_no_room_beside_one_that_speaks(self, make_bench: MakeBench) -> None:
        """A model that would fit if another were idle waits for that, and comes as soon as the other has spoken."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        bench.speak("r", "a b c", credit=1)
        bench.speak("s", "x", model="n")
        bench.settle()
        bench.clock.advance(SHORTAGE_WAIT_S - 1)
        bench.settle()
        assert bench.heard("s") == []
        bench.credit("r", 9)
        bench.settle()
        assert (bench.words("r"), bench.words("s")) == ("a b c", "x")

    def test_room_from_one_that_is_asked_again_at_once(self, make_bench: MakeBench) -> None:
        """A model that is idle only from a request's end to the next one's coming makes room between the two."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        bench.speak("r", "a", credit=0)
        bench.speak("s", "x", model="n")
        bench.settle()
        bench.credit("r", 1)
        bench.turn()
        assert bench.kinds("r")[-1] == "Finished"
        bench.speak("r2", "b")
        bench.settle()
        assert (bench.words("s"), bench.words("r2")) == ("x", "b")

    def test_two_at_once_where_one_fits(self, make_bench: MakeBench) -> None:
        """Of two models that are asked for together on a device with room for one, both speak, one after the other."""
        bench = make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150))
        bench.speak("r", "a b c")
        bench.speak("s", "x y z", model="n")
        bench.settle()
        assert (bench.words("r"), bench.words("s")) == ("a b c", "x y z")

    def test_no_room(self, make_bench: MakeBench) -> None:
        """A model that finds no room for too long is refused with the arithmetic; who speaks goes on."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        bench.speak("r", "a b c", credit=1)
        bench.speak("s", "x", model="n")
        bench.settle()
        bench.clock.advance(SHORTAGE_WAIT_S)
        bench.settle()
        (failed,) = bench.heard("s")
        assert failed.code == "insufficient_vram"
        assert "n needs" in failed.message
        bench.credit("r", 9)
        bench.settle()
        assert bench.words("r") == "a b c"

    def test_idle_models_make_room(self, make_bench: MakeBench) -> None:
        """An idle model leaves for one that is asked for, and comes back when it is asked for itself."""
        bench = _loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        bench.speak("r", "x", model="n")
        bench.settle()
        assert bench.states() == {"m": "offloaded", "n": "resident"}
        bench.speak("s", "y")
        bench.settle()
        assert bench.words("s") == "y"
        assert len(bench.opened) == 2

    def test_keep_alive(self, make_bench: MakeBench) -> None:
        """A request says how long its model stays: not at all, or as configured."""
        bench = make_bench({"m": 100}, idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=True)
        bench.speak("r", "x", keep_alive_s=0)
        bench.settle()
        assert bench.states() == {"m": "offloaded"}
        bench.speak("s", "y")
        bench.settle()
        bench.clock.advance(9)
        bench.settle()
        assert bench.states() == {"m": "resident"}
        bench.clock.advance(2)
        bench.settle()
        assert bench.states() == {"m": "offloaded"}

    def test_keep_alive_of_who_never_spoke(self, make_bench: MakeBench) -> None:
        """A request that is given up in the queue has no say in how long the model stays."""
        bench = make_bench(slots=1, idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=True)
        bench.speak("r", "a b", keep_alive_s=-1, credit=1)
        bench.settle()
        bench.speak("s", "x", keep_alive_s=0)
        bench.turn()
        bench.credit("r", 1)
        bench.cancel("s")
        bench.settle()
        bench.clock.advance(60)
        bench.settle()
        assert bench.states() == {"m": "resident"}
        assert bench.snapshot().models[0].keep_alive_s == -1

    def test_never_taken_from_a_stalled_stream(self, make_bench: MakeBench) -> None:
        """A request whose reader pauses keeps its model, for however long."""
        bench = make_bench(idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=True, stall_timeout_s=1_000)
        bench.speak("r", "a b", credit=1)
        bench.settle()
        bench.clock.advance(500)
        bench.settle()
        assert bench.states() == {"m": "resident"}
        bench.credit("r", 1)
        bench.settle()
        assert bench.words("r") == "a b"

    def test_growth_is_measured(self, bench: WorkerBench) -> None:
        """What a model holds is measured again when a request has left it."""
        _loaded(bench)
        bench.engines["m"].n_bytes = 140
        bench.speak("r", "x")
        bench.settle()
        (model,) = bench.snapshot().models
        assert model.bytes == {"weights": 140}

    def test_unload_between(self, bench: WorkerBench) -> None:
        """A model that was dropped by hand is opened anew for the next request."""
        _loaded(bench)
        bench.call("c", UnloadModel(model="m"))
        bench.settle()
        assert bench.states() == {"m": "absent"}
        bench.speak("r", "x")
        bench.settle()
        assert bench.words("r") == "x"
        assert len(bench.opened) == 2


class TestDrain:
    """The process is to end."""

    def test_running_end_queued_fail(self, make_bench: MakeBench) -> None:
        """What speaks is said to its end; what waits, and what comes, is refused with a time to come back."""
        bench = _loaded(make_bench(slots=1))
        bench.speak("r", "a b c")
        bench.speak("s", "x")
        bench.turn()
        bench.inbox.put(Drain(30))
        bench.turn()
        bench.speak("t", "y")
        bench.inbox.put(Drain(0))
        bench.worker.run()
        assert bench.words("r") == "a b c"
        assert bench.kinds("r")[-1] == "Finished"
        for name in "st":
            (failed,) = bench.heard(name)
            assert failed.code == "shutting_down"
            assert failed.retry_after_s is not None

    def test_deadline(self, bench: WorkerBench) -> None:
        """What is not said in time is failed, not left hanging."""
        _loaded(bench)
        bench.speak("r", "a b c", credit=1)
        bench.inbox.put(Drain(30))
        bench.settle()
        bench.clock.advance(31)
        bench.worker.run()
        assert bench.kinds("r") == ["Started", "Audio", "Failed"]
        assert bench.answer("r").code == "shutting_down"
        assert bench.engines["m"].jobs == set()

    def test_calls(self, make_bench: MakeBench) -> None:
        """No model is loaded by hand any more, and calls that still wait at the end are told that it is the end."""
        bench = make_bench({"m": 100, "n": 100})
        bench.gate.clear()
        bench.call("load", LoadModel(model="m"))
        bench.speak("r", "one")
        bench.settle()
        bench.call("clean", Cleanup())
        bench.turn()
        bench.inbox.put(Drain(30))
        bench.call("late", LoadModel(model="n"))
        bench.worker.run()
        for name in ("load", "clean", "late", "r"):
            (failed,) = bench.heard(name)
            assert failed.code == "shutting_down"
        assert bench.states()["n"] == "absent"

    def test_idle(self, bench: WorkerBench) -> None:
        """With nothing to do it ends at once."""
        bench.inbox.put(Drain(30))
        bench.worker.run()
        assert bench.sent == []

    def test_shows(self, bench: WorkerBench) -> None:
        """The snapshot says that nothing more is taken."""
        _loaded(bench)
        bench.speak("r", "a b", credit=0)
        bench.turn()
        assert bench.snapshot().accepting
        bench.inbox.put(Drain(30))
        assert not bench.snapshot().accepting


class TestTalk:
    """Hello, ping, and what they show."""

    def test_hello(self, bench: WorkerBench) -> None:
        """A newcomer hears who this is and what there is to speak with."""
        bench.tell(Hello(version=VERSION, token=""))
        bench.turn()
        ((peer, welcome, payload),) = bench.sent
        assert (peer, payload) == (WEB, None)
        assert isinstance(welcome, Welcome)
        assert (welcome.version, welcome.boot_id, welcome.catalog) == (VERSION, "boot-1", bench.specs)
        assert welcome.snapshot.boot_id == "boot-1"

    def test_ping(self, make_bench: MakeBench) -> None:
        """The loop itself answers, with everything that dashboards read."""
        bench = _loaded(make_bench({"m": 100, "n": 50}, slots=2))
        voice = bench.save_voice("Mine")
        bench.speak("r", "a b", credit=1)
        for name in "stu":
            bench.speak(name, "c", credit=0)
        bench.settle()
        bench.clock.advance(5)
        bench.tell(Ping(), peer=OTHER)
        bench.turn()
        peer, pong, _ = bench.sent[-1]
        assert peer == OTHER
        assert isinstance(pong, Pong)
        snapshot = pong.snapshot
        assert (snapshot.boot_id, snapshot.default_model, snapshot.accepting) == ("boot-1", "m", True)
        assert (snapshot.running, snapshot.queued, snapshot.slots) == (2, 2, 2)
        assert snapshot.requests == Counters(started=3, finished=1)
        assert [(model.id, model.state, model.references) for model in snapshot.models] == [
            ("m", "resident", 4),
            ("n", "absent", 0),
        ]
        assert snapshot.device.ours_bytes == 100
        assert snapshot.host.total_bytes == bench.device.host_total_bytes
        assert snapshot.shared_bytes == {"codec": 7}
        assert snapshot.voices == [voice]
        assert snapshot.uptime_s == pytest.approx(5.0)
        assert snapshot.cleanup is None
        assert snapshot.restarts == 2
        assert [(stream.id, stream.client, stream.state, stream.age_s) for stream in snapshot.streams] == [
            ("r", "alice", "stalled", 5.0),
            ("s", "alice", "stalled", 5.0),
            ("t", "alice", "waiting", 5.0),
            ("u", "alice", "waiting", 5.0),
        ]


class TestFigures:
    """What is counted of speech and models."""

    def test_speech(self, bench: WorkerBench) -> None:
        """Each stream's first sound and its end, once; the loading that it waited for is a move."""
        bench.load_s = 2.0
        bench.speak("r", "a b c")
        bench.settle()
        figures = bench.snapshot().figures["m"]
        assert (sum(figures.first_audio_s.counts), figures.first_audio_s.sum) == (1, pytest.approx(2.0))
        assert (sum(figures.real_time_factor.counts), sum(figures.underrun_s.counts)) == (1, 1)
        assert {kind: sum(moves.counts) for kind, moves in figures.moves_s.items()} == {"load": 1}

    def test_gap_of_ours(self, bench: WorkerBench) -> None:
        """Steps that take longer than what they say sounds make the player stand still."""
        _loaded(bench)
        bench.engines["m"].step_s = 1.0
        bench.speak("r", "a b c")
        bench.settle()
        figures = bench.snapshot().figures["m"]
        assert figures.underrun_s.sum == pytest.approx(2.0, abs=0.01)
        assert sum(figures.underrun_s.counts[1:]) == 1

    def test_gap_of_the_reader(self, bench: WorkerBench) -> None:
        """Without credit there is nothing to play, and that is not the worker's doing."""
        _loaded(bench)
        bench.speak("r", "a b c", credit=1)
        bench.settle()
        bench.clock.advance(30)
        bench.credit("r", 9)
        bench.settle()
        assert bench.words("r") == "a b c"
        figures = bench.snapshot().figures["m"]
        assert figures.underrun_s.sum == pytest.approx(0.0, abs=0.01)
        assert figures.real_time_factor.sum == pytest.approx(0.0, abs=1.0)

    def test_given_up(self, bench: WorkerBench) -> None:
        """A stream that is cancelled was heard to begin, and says nothing of how it would have ended."""
        _loaded(bench)
        bench.speak("r", "a b c")
        bench.turn()
        bench.cancel("r")
        bench.settle()
        figures = bench.snapshot().figures["m"]
        assert (sum(figures.first_audio_s.counts), sum(figures.underrun_s.counts)) == (2, 1)

    def test_failures(self, bench: WorkerBench) -> None:
        """A load that fails, and memory that runs out while a model speaks."""
        bench.open_troubles["m"] = [OSError("no such file")]
        bench.speak("r", "a")
        bench.settle()
        bench.speak("s", "a")
        bench.settle()
        bench.engines["m"].step_troubles.append(MemoryError())
        bench.speak("t", "a")
        bench.settle()
        bench.engines["m"].admit_troubles.append(MemoryError())
        bench.speak("u", "a")
        bench.settle()
        figures = bench.snapshot().figures["m"]
        assert (figures.failed_moves, figures.out_of_memory) == ({"load": 1}, 2)
        assert sum(figures.moves_s["load"].counts) == 1

    def test_settings(self, bench: WorkerBench) -> None:
        """A web worker that says Hello hears by which settings this worker acts."""
        bench.tell(Hello(version=VERSION, token=""))
        bench.turn()
        _, welcome, _ = bench.sent[-1]
        assert isinstance(welcome, Welcome)
        assert welcome.settings == {"idle_timeout": 300.0, "default_model": "m"}


class _Crowd:
    """Web workers that do as the dice say; it knows what they were given and what they gave up."""

    def __init__(self, bench: WorkerBench, seed: int) -> None:
        self._bench = bench
        self._dice = random.Random(seed)  # noqa: S311 -- a dice, not a secret
        self.credit: dict[tuple[bytes, str], int] = {}
        self.dropped: set[tuple[bytes, str]] = set()

    def do_something(self) -> None:
        """One thing, and a few turns."""
        things = [self._speak, self._speak, self._grant, self._grant, self._cancel, self._leave, self._break]
        self._dice.choice(things)(self._dice.choice([b"web-1", b"web-2", b"web-3"]))
        self._bench.turn(self._dice.randrange(3))

    def read_everything(self) -> None:
        """Whoever is still there takes all there is."""
        for peer, name in self.credit.keys() - self.dropped:
            self._give(peer, name, 100)
        self._bench.settle()

    def _speak(self, peer: bytes) -> None:
        name, credit = f"r{len(self.credit)}", self._dice.randrange(4)
        self.credit[peer, name] = credit
        words = " ".join(self._dice.choices(["a", "b", "c", "d", "e", "fault"], k=self._dice.randrange(1, 9)))
        model, client = self._dice.choice("mn"), self._dice.choice("xyz")
        self._bench.speak(name, words, peer=peer, model=model, client=client, credit=credit)

    def _grant(self, peer: bytes) -> None:
        for name in self._one_of(peer):
            self._give(peer, name, self._dice.randrange(1, 5))

    def _cancel(self, peer: bytes) -> None:
        for name in self._one_of(peer):
            self.dropped.add((peer, name))
            self._bench.cancel(name, peer)

    def _leave(self, peer: bytes) -> None:
        if self._dice.random() < 0.1:
            self.dropped.update(key for key in self.credit if key[0] == peer)
            self._bench.inbox.put(PeerGone(peer))

    def _break(self, _peer: bytes) -> None:
        if self._bench.engines and self._dice.random() < 0.3:
            trouble = self._dice.choice([ValueError("broken"), MemoryError("full")])
            self._bench.engines[self._dice.choice(list(self._bench.engines))].step_troubles.append(trouble)

    def _give(self, peer: bytes, name: str, chunks: int) -> None:
        self.credit[peer, name] += chunks
        self._bench.tell(Credit(id=name, chunks=chunks), peer=peer)

    def _one_of(self, peer: bytes) -> list[str]:
        mine = [name for to, name in self.credit if to == peer and (to, name) not in self.dropped]
        return [self._dice.choice(mine)] if mine else []


@pytest.mark.parametrize(("seed", "budget_bytes"), [(0, 150), (1, 200), (2, 200)])
def test_whatever_happens(make_bench: MakeBench, seed: int, budget_bytes: int) -> None:
    """Through any mixture of requests, credit, cancels, faults and departures the promises hold.

    Never more pieces than credit, no gap, one last word and nothing behind it, none twice for the cancelled;
    in the end no slot, no place in the queue and no reference is left, and every request has been counted once.
    """
    device = FakeDevice(budget_bytes=budget_bytes)
    bench = make_bench({"m": 100, "n": 100}, slots=3, max_concurrency=4, max_queue=6, device=device)
    crowd = _Crowd(bench, seed)
    for _ in range(1_000):
        crowd.do_something()
    crowd.read_everything()

    ends = {"Finished": 0, "Failed": 0}
    for (peer, name), credit in crowd.credit.items():
        kinds = bench.kinds(name, peer)
        numbers = [message.seq for message in bench.heard(name, peer) if isinstance(message, Audio)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) <= credit
        ended = [kind for kind in kinds if kind in ends]
        assert len(ended) == 1 or (not ended and (peer, name) in crowd.dropped)
        for end in ended:
            assert kinds[-1] == end
            ends[end] += 1
    assert min(ends.values()) > 10
    assert bench.references() == {"m": 0, "n": 0}
    assert not any(engine.jobs for engine in bench.engines.values())
    snapshot = bench.snapshot()
    assert (snapshot.running, snapshot.queued) == (0, 0)
    counted = snapshot.requests
    assert counted.failed + counted.rejected == ends["Failed"]
    assert counted.finished + counted.failed + counted.cancelled + counted.rejected == len(crowd.credit)
