"""A request from Speak to Finished."""

import pytest

from shared.pcm import SAMPLE_RATE
from shared.protocol import (
    Audio,
    Finished,
    Sampling,
    Started,
    Usage,
)
from tests.gpu_worker.worker_bench import OTHER, VOICE, MakeBench, WorkerBench, loaded, pcm_of


class TestSpeaking:
    """From Speak to Finished."""

    def test_order_of_messages(self, bench: WorkerBench) -> None:
        """Started, every piece with its number and without a gap, Finished, and no message after it."""
        bench.speak("r", "one two three")
        bench.settle()
        messages = bench.messages("r")
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
        """The engine gets every field that the web worker resolved."""
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
        """A recording in the payload becomes the reference, with its transcript."""
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
        """A saved voice becomes the reference, and the job names no preset voice."""
        voice = bench.save_voice("Mine", text="what it says")
        bench.speak("r", "one", voice=voice.id, saved_voice=True)
        bench.speak("x", "one", voice="voice_none", saved_voice=True)
        bench.settle()
        (job,) = bench.engines["m"].admitted
        assert job.voice == ""
        assert job.reference is not None
        assert (job.reference.pcm, job.reference.text) == (VOICE, "what it says")
        assert (bench.last_message("x").code, bench.last_message("x").param) == ("voice_not_found", "voice")

    def test_saved_voice_as_embedding(self, bench: WorkerBench) -> None:
        """A saved voice can be cloned from its embedding alone; the two modes have different cache keys."""
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
        """Requests of several web workers run together, one piece each in every step, and are never mixed up."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.speak("r", "x y z", peer=OTHER)
        bench.turn()
        assert (bench.words("r"), bench.words("r", OTHER)) == ("a", "x")
        bench.settle()
        assert (bench.words("r"), bench.words("r", OTHER)) == ("a b c", "x y z")
        assert bench.kinds("r", OTHER)[-1] == "Finished"

    def test_two_models(self, make_bench: MakeBench) -> None:
        """While one model is loading, another goes on speaking."""
        bench = loaded(make_bench({"m": 100, "n": 100}))
        bench.load_gate.clear()
        bench.speak("r", "one two three")
        bench.speak("s", "four", model="n")
        bench.turn(4)
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Audio", "Finished"]
        assert bench.kinds("s") == []
        assert bench.states()["n"] == "loading"
        bench.load_gate.set()
        bench.settle()
        assert bench.words("s") == "four"

    def test_id_in_use(self, bench: WorkerBench) -> None:
        """A second request with the same id is refused and does not disturb the first; later the id is free."""
        loaded(bench)
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
        """The load is part of the wait, the first audio comes after it, the total runs to the end."""
        bench.load_s = 2.0
        bench.speak("r", "one two three")
        while not bench.engines or bench.is_moving:
            bench.turn()
        bench.clock.advance(0.5)
        bench.engines["m"].step_s = 0.25
        bench.settle()
        timings = bench.last_message("r").timings
        assert timings.load_s == pytest.approx(2.0)
        assert timings.queue_s == pytest.approx(2.0)
        # The first step was in the turn that handled the report of the load, before the engine was slowed down.
        assert timings.first_audio_s == pytest.approx(2.0)
        assert timings.total_s == pytest.approx(2.0 + 0.5 + 2 * 0.25)

    def test_timings_of_a_wait_for_a_slot(self, make_bench: MakeBench) -> None:
        """A wait for other requests is part of the queue time, not of the load time."""
        bench = loaded(make_bench(slots=1))
        bench.engines["m"].step_s = 1.0
        bench.speak("r", "one two three")
        bench.speak("s", "four")
        bench.settle()
        timings = bench.last_message("s").timings
        assert (timings.load_s, timings.queue_s) == (0.0, pytest.approx(3.0))
        assert (timings.first_audio_s, timings.total_s) == (pytest.approx(4.0), pytest.approx(4.0))
