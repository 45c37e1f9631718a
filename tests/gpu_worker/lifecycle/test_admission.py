"""Which requests the loop queues, and which it starts."""

from gpu_worker.engines.base import JobError
from gpu_worker.lifecycle.admission import UNKNOWN_SLOTS
from shared.protocol import (
    Counters,
    Failed,
    Started,
    UnloadModel,
)
from tests.gpu_worker.worker_bench import MakeBench, WorkerBench, loaded


class TestRefusals:
    """Requests that are not queued, or that the engine does not take."""

    def test_unknown_model(self, bench: WorkerBench) -> None:
        """The error names the unknown model and the known ones."""
        bench.speak("r", "one", model="nonesuch")
        bench.settle()
        (failed,) = bench.messages("r")
        assert (failed.code, failed.param) == ("model_not_found", "model")
        assert "'nonesuch'" in failed.message
        assert "there are m" in failed.message
        assert bench.snapshot().requests == Counters(rejected=1)

    def test_unavailable_model(self, bench: WorkerBench) -> None:
        """The error says what is missing; the files are checked again at the next request."""
        bench.files.problems["m"] = "its weights are not there"
        bench.speak("r", "one")
        bench.settle()
        (failed,) = bench.messages("r")
        assert (failed.code, failed.message) == ("model_unavailable", "m: its weights are not there")
        assert failed.retry_after_s is not None
        assert bench.states() == {"m": "unavailable"}
        bench.files.problems.clear()
        bench.speak("s", "one")
        bench.settle()
        assert bench.words("s") == "one"

    def test_queue_full(self, make_bench: MakeBench) -> None:
        """One request too many is refused with a time to retry; the waiting ones are served."""
        bench = loaded(make_bench(slots=1, max_queue=2))
        for name in "abcd":
            bench.speak(name, "one two")
        bench.settle()
        (failed,) = bench.messages("d")
        assert failed.code == "queue_full"
        assert failed.retry_after_s >= 1
        assert "2 requests are waiting already" in failed.message
        assert [bench.kinds(name)[-1] for name in "abc"] == ["Finished"] * 3
        assert bench.snapshot().requests == Counters(started=4, finished=4, rejected=1)

    def test_free_slots_come_before_the_queue(self, make_bench: MakeBench) -> None:
        """While the model loads, its free slots count as places; once they are taken, only the queue's own count."""
        bench = loaded(make_bench(slots=3, max_queue=2))
        bench.call("u", UnloadModel(model="m"))
        bench.settle()
        bench.load_gate.clear()
        names = "abcdefgh"
        for name in names:
            bench.speak(name, "one two")
        bench.worker.turn()
        assert bench.snapshot().queued == 5
        assert [name for name in names if "Failed" in bench.kinds(name)] == ["f", "g", "h"]
        bench.load_gate.set()
        bench.settle()
        assert [bench.kinds(name)[-1] for name in "abcde"] == ["Finished"] * 5
        for name in "ijklmn":
            bench.speak(name, "one two")
        bench.worker.turn()
        assert [name for name in "ijklmn" if "Failed" in bench.kinds(name)] == ["n"]

    def test_slots_of_a_model_that_was_never_loaded(self, make_bench: MakeBench) -> None:
        """It counts as one with the usual number of slots, and never with more than are free."""
        for max_concurrency, places in ((16, UNKNOWN_SLOTS + 2), (3, 5)):
            bench = make_bench(slots=3, max_concurrency=max_concurrency, max_queue=2)
            bench.load_gate.clear()
            for number in range(20):
                bench.speak(f"{number}", "one two")
            bench.worker.turn()
            assert bench.snapshot().queued == places

    def test_full_queue_of_another_model(self, make_bench: MakeBench) -> None:
        """A request that can start at once is never refused, however many wait for another model's load."""
        bench = loaded(make_bench({"m": 100, "n": 100}, slots=2, max_concurrency=2, max_queue=1))
        bench.load_gate.clear()
        for name in "abcd":
            bench.speak(name, "one", model="n")
        bench.worker.turn()
        assert bench.snapshot().queued == 3
        bench.speak("r", "one")
        bench.worker.turn()
        assert bench.kinds("r")[0] == "Started"
        bench.load_gate.set()
        bench.settle()
        assert bench.words("r") == "one"

    def test_engine_refuses_a_job(self, bench: WorkerBench) -> None:
        """A job that the engine refuses fails alone."""
        loaded(bench)
        bench.engines["m"].admit_errors.append(JobError("voice_not_found", "no such voice", param="voice"))
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        assert bench.messages("r") == [Failed(id="r", code="voice_not_found", message="no such voice", param="voice")]
        assert bench.words("s") == "two"
        assert bench.references() == {"m": 0}

    def test_engine_fails_to_admit(self, bench: WorkerBench) -> None:
        """An error of `admit` fails that request and no other."""
        loaded(bench)
        bench.engines["m"].admit_errors.append(KeyError("klingon"))
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        assert [message.code for message in bench.messages("r")] == ["synthesis_failed"]
        assert bench.words("s") == "two"

    def test_files_are_checked_on_another_thread(self, bench: WorkerBench) -> None:
        """The synthesis thread never reads model files."""
        bench.files.problems["m"] = "its weights are not there"
        for name in "rs":
            bench.speak(name, "one")
            bench.settle()
        assert bench.files.threads["problem_of"] == {"check-files"}


class TestQueue:
    """Which request starts next."""

    def test_a_refused_text_costs_its_client_no_turn(self, make_bench: MakeBench) -> None:
        """The engine has said nothing of it, however long it is."""
        bench = loaded(make_bench(slots=1))
        bench.engines["m"].admit_errors.append(JobError("voice_not_found", "no such voice", param="voice"))
        bench.speak("a1", "word " * 1000, client="alice")
        bench.turn()
        assert bench.kinds("a1") == ["Failed"]
        for name, client in (("c1", "carol"), ("a2", "alice"), ("b1", "bob")):
            bench.speak(name, "word", client=client)
        bench.settle()
        order = [message.id for _, message, _ in bench.sent if isinstance(message, Started)]
        assert order == ["c1", "a2", "b1"]

    def test_clients_take_turns(self, make_bench: MakeBench) -> None:
        """A client with many requests delays another client by the one that speaks."""
        bench = loaded(make_bench(slots=1))
        for name in ("a1", "a2", "a3"):
            bench.speak(name, "word", client="alice")
        bench.speak("b1", "word", client="bob")
        bench.settle()
        order = [message.id for _, message, _ in bench.sent if isinstance(message, Started)]
        assert order == ["a1", "b1", "a2", "a3"]

    def test_max_concurrency(self, make_bench: MakeBench) -> None:
        """At most max_concurrency requests hold a slot, however many slots the engines have."""
        bench = loaded(make_bench({"m": 100, "n": 100}, slots=4, max_concurrency=3), "m", "n")
        for index in range(3):
            bench.speak(f"m{index}", "one two three")
            bench.speak(f"n{index}", "one two three", model="n")
        bench.turn()
        snapshot = bench.snapshot()
        assert (snapshot.running, snapshot.queued, snapshot.slots) == (3, 3, 3)
        bench.settle()
        assert bench.snapshot().requests.finished == 2 + 6

    def test_full_model_holds_up_no_other(self, make_bench: MakeBench) -> None:
        """A request for a model without a free slot holds up no request for another model."""
        bench = loaded(make_bench({"m": 100, "n": 100}, slots=1), "m", "n")
        bench.speak("a", "one two three")
        bench.speak("b", "one two three")
        bench.speak("c", "one", model="n")
        bench.turn()
        assert bench.kinds("c") == ["Started", "Audio", "Finished"]
        assert bench.kinds("b") == []
