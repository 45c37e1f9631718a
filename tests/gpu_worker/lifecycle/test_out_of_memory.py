"""The device runs out of memory in a step or an admission."""

import pytest

from gpu_worker.requests import MIN_SLICE_S
from gpu_worker.scheduling.slot_policy import MIN_IN_HAND_S
from shared.protocol import PinModel
from tests.gpu_worker.worker_bench import MakeBench, WorkerBench, loaded


class TestOutOfMemory:
    """The device runs out of memory in a step or in an admission."""

    def test_idle_models_are_evicted_and_the_step_repeated(self, make_bench: MakeBench) -> None:
        """Idle models are evicted, the step runs again, and no request fails."""
        bench = loaded(make_bench({"m": 100, "n": 100}), "m", "n")
        bench.engines["m"].step_errors.extend([None, MemoryError("full")])
        bench.speak("r", "a b c")
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Audio", "Finished"]
        assert bench.states() == {"m": "resident", "n": "offloaded"}

    def test_youngest_request_fails(self, bench: WorkerBench) -> None:
        """If the second try fails, too, the youngest request fails; the others go on."""
        loaded(bench)
        bench.speak("old", "a b c")
        bench.turn()
        bench.clock.advance(1)
        bench.engines["m"].step_errors.extend([None, MemoryError("full"), MemoryError("still full")])
        bench.speak("young", "x y z")
        bench.settle()
        assert bench.kinds("young") == ["Started", "Audio", "Failed"]
        assert bench.last_message("young").code == "insufficient_vram"
        assert bench.last_message("young").retry_after_s is not None
        assert bench.words("old") == "a b c"
        assert bench.kinds("old")[-1] == "Finished"

    def test_only_request_fails(self, bench: WorkerBench) -> None:
        """A request that does not fit alone fails, and the model serves the next."""
        loaded(bench)
        bench.engines["m"].step_errors.extend([MemoryError("full"), MemoryError("full")])
        bench.speak("r", "a b c")
        bench.settle()
        assert bench.last_message("r").code == "insufficient_vram"
        bench.speak("s", "x")
        bench.settle()
        assert bench.words("s") == "x"

    def test_cancelled_meanwhile(self, bench: WorkerBench) -> None:
        """The only request is cancelled before the second try: the model serves the next one."""
        loaded(bench)
        bench.engines["m"].step_errors.append(MemoryError("full"))
        bench.speak("r", "a b c")
        bench.turn()
        bench.cancel("r")
        bench.turn()
        bench.speak("s", "x")
        bench.settle()
        assert bench.words("s") == "x"

    def test_parked_before_the_second_try(self, make_bench: MakeBench) -> None:
        """The only request leaves its slot before the second try: it comes back, and the model takes requests."""
        bench = loaded(make_bench({"m": 100, "n": 100}, max_concurrency=1), "m", "n")
        bench.result_of(PinModel(model="n", pinned=True))
        bench.engines["m"].word_s = 2 * MIN_IN_HAND_S
        bench.speak("r", "a b c")
        bench.turn()
        bench.clock.advance(MIN_SLICE_S)
        bench.engines["m"].step_errors.append(MemoryError("full"))
        bench.turn()
        bench.speak("s", "x", model="n")
        bench.turn()
        assert bench.engines["m"].parked
        bench.settle()
        bench.speak("t", "y")
        bench.settle()
        assert (bench.kinds("r")[-1], bench.words("s"), bench.kinds("t")[-1]) == ("Finished", "x", "Finished")

    def test_other_models_go_on_during_the_eviction(self, make_bench: MakeBench) -> None:
        """During the eviction the model without memory is not stepped and no request starts; another model speaks."""
        bench = loaded(make_bench({"m": 100, "n": 100, "idle": 100}), "m", "n", "idle")
        bench.engines["m"].step_errors.append(MemoryError("full"))
        bench.speak("r", "a b c")
        bench.speak("t", "x y z", model="n")
        bench.loses_transitions = True
        bench.turn()  # the eviction begins and does not end
        steps = bench.engines["m"].steps
        bench.speak("s", "d")
        bench.turn(3)
        assert bench.words("t") == "x y z"
        assert bench.engines["m"].steps == steps
        assert bench.kinds("s") == []

    @pytest.mark.parametrize(("failures", "last"), [(1, "Finished"), (2, "Failed")])
    def test_no_wait_for_a_load(self, make_bench: MakeBench, failures: int, last: str) -> None:
        """While a model is loading, nothing can be evicted: the second try comes at once, whatever its result.

        The model's other requests go on; idle models are evicted after the load.
        """
        bench = loaded(make_bench({"m": 100, "n": 100, "idle": 100}), "m", "idle")
        bench.speak("old", "a b c d")
        bench.turn()
        bench.clock.advance(1)
        bench.load_gate.clear()
        bench.speak("n", "x", model="n")
        bench.settle()
        assert bench.states()["n"] == "loading"
        bench.engines["m"].step_errors.extend([MemoryError("full")] * failures)
        bench.speak("young", "a b c")
        bench.turn(6)
        assert bench.words("old") == "a b c d"
        assert bench.kinds("young")[-1] == last
        bench.load_gate.set()
        bench.settle()
        assert bench.states() == {"m": "resident", "n": "resident", "idle": "offloaded"}

    def test_admission(self, make_bench: MakeBench) -> None:
        """A request that cannot be admitted for lack of memory waits for the eviction and keeps its place."""
        bench = loaded(make_bench({"m": 100, "n": 100}, slots=1), "m", "n")
        bench.engines["m"].admit_errors.append(MemoryError("full"))
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        assert (bench.words("r"), bench.words("s")) == ("one", "two")
        assert [job.text for job in bench.engines["m"].admitted[1:]] == ["one", "two"]
        assert bench.states() == {"m": "resident", "n": "offloaded"}

    def test_admission_fails_twice(self, bench: WorkerBench) -> None:
        """After the second try it fails alone, with a time to retry."""
        loaded(bench)
        bench.engines["m"].admit_errors.extend([MemoryError("full"), MemoryError("full")])
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        assert [message.code for message in bench.messages("r")] == ["insufficient_vram"]
        assert bench.last_message("r").retry_after_s is not None
        assert bench.words("s") == "two"
        assert bench.references() == {"m": 0}

    def test_cancelled_before_the_second_admission(self, make_bench: MakeBench) -> None:
        """A request that waits for its second admission can be cancelled like any queued request."""
        bench = loaded(make_bench({"m": 100, "n": 100}), "m", "n")
        bench.engines["m"].admit_errors.append(MemoryError("full"))
        bench.speak("r", "one")
        bench.turn()
        bench.cancel("r")
        bench.settle()
        assert bench.messages("r") == []
        assert bench.references() == {"m": 0, "n": 0}
