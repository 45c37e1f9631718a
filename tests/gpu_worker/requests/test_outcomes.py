"""How requests ended: what FindSpeech answers in each state of a request, and the bounds of what is kept."""

import msgspec
import pytest

from gpu_worker.requests.outcomes import MAX_MESSAGE, MAX_OUTCOMES, Outcomes
from gpu_worker.transport import PeerGone
from shared.protocol import FindSpeech, SpeechError, SpeechOutcome, Spoken, Usage
from tests.gpu_worker.worker_bench import WEB, MakeBench, WorkerBench, loaded

ERROR = SpeechError(code="internal_error", message="the encoder failed")


def found(bench: WorkerBench, name: str, client: str = "") -> SpeechOutcome:
    """The outcome of the request that is known as `name`."""
    outcome = answer(bench, name, client).speech
    assert isinstance(outcome, SpeechOutcome)
    return outcome


def answer(bench: WorkerBench, name: str, client: str = "") -> object:
    """The answer to FindSpeech, in a turn that speaks as well."""
    call_id = f"find-{len(bench.sent)}"
    bench.call(call_id, FindSpeech(id=name, client=client))
    bench.turn()
    return bench.last_message(call_id)


def an_outcome(speak_id: str = "r.1", **changes: object) -> SpeechOutcome:
    """The outcome of a request that is done."""
    plain = SpeechOutcome(id=speak_id, client="alice", status="done", model="m", voice="v", finish_reason="stop")
    return msgspec.structs.replace(plain, **changes)


class TestWorker:
    """A request from the queue to its end, found by its request id and by its speech id."""

    def test_done(self, make_bench: MakeBench) -> None:
        """Queued, speaking until the last piece is sent, then done with the figures of Finished."""
        bench = loaded(make_bench(slots=1))
        bench.speak("first", "a b c d e f")
        bench.speak("mine.7f", "x y", voice="anna", credit=1)
        bench.turn()
        assert found(bench, "mine").status == "queued"
        bench.settle()
        said = found(bench, "7f")
        assert (said.status, said.voice, said.model, said.usage) == ("speaking", "anna", "m", None)
        bench.clock.advance(5)
        bench.credit("mine.7f", 5)
        bench.settle()
        done = found(bench, "mine")
        finished = bench.last_message("mine.7f")
        assert (done.status, done.finish_reason, done.usage) == ("done", "stop", Usage(input_tokens=2, output_tokens=4))
        assert (done.timings, done.error, done.id) == (finished.timings, None, "mine.7f")

    def test_failed(self, bench: WorkerBench) -> None:
        """The error of a request that failed as it spoke, and of one that was not even queued."""
        loaded(bench)
        bench.speak("r", "a fault")
        bench.settle()
        failed = found(bench, "r")
        assert (failed.status, failed.usage) == ("failed", None)
        assert failed.error == SpeechError(code="invalid_audio", message="this one cannot be said", param="ref_audio")
        bench.speak("s", "a", model="x")
        bench.settle()
        assert found(bench, "s").error == SpeechError(
            code="model_not_found", message="there is no model 'x'; there are m", param="model"
        )

    @pytest.mark.parametrize(("error", "status"), [(None, "cancelled"), (ERROR, "failed")])
    def test_cancelled(self, bench: WorkerBench, error: SpeechError | None, status: str) -> None:
        """A client that left, or a response that failed: while it is spoken, and when all was sent already."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.turn()
        bench.cancel("r", error=error)
        bench.settle()
        assert (found(bench, "r").status, found(bench, "r").error) == (status, error)
        bench.speak("s", "a")
        bench.settle()
        bench.cancel("s", error=error)
        bench.settle()
        late = found(bench, "s")
        assert (late.status, late.error, late.finish_reason) == (status, error, "stop")

    def test_a_draining_request_is_cancelled(self, bench: WorkerBench) -> None:
        """Speech that was made but not sent is not done."""
        loaded(bench)
        bench.speak("r", "a b c", credit=1)
        bench.settle()
        bench.cancel("r")
        bench.settle()
        assert found(bench, "r").status == "cancelled"

    def test_a_web_worker_is_gone(self, bench: WorkerBench) -> None:
        """The responses of a web worker that died have failed."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.turn()
        bench.inbox.put(PeerGone(WEB))
        bench.settle()
        bench.call("c", FindSpeech(id="r"), peer=b"web-2")
        bench.turn()
        [message] = [message for _, message, _ in bench.sent if getattr(message, "id", "") == "c"]
        assert message.speech.status == "failed"
        assert "gone" in message.speech.error.message

    def test_answered_by_a_web_worker(self, bench: WorkerBench) -> None:
        """An outcome of a request that a web worker has answered by itself is kept as well."""
        outcome = an_outcome("r.1", finish_reason="empty")
        bench.send(Spoken(outcome=outcome))
        bench.turn()
        assert found(bench, "r") == outcome

    def test_only_ones_own(self, bench: WorkerBench) -> None:
        """With a client, only its requests are found: open ones, and ended ones."""
        loaded(bench)
        bench.speak("x.1", "a", client="alice")
        bench.speak("x.2", "b c d e f", client="bob")
        bench.turn(2)
        assert found(bench, "x", "alice").id == "x.1"
        assert found(bench, "x", "bob").id == "x.2"
        assert found(bench, "x").id == "x.2"
        for name, client in (("1", "bob"), ("2", "alice"), ("x", "eve"), ("y", "")):
            assert answer(bench, name, client).code == "not_found"


class TestOutcomes:
    """The outcomes that are kept."""

    def test_the_last_ones(self) -> None:
        """The oldest one makes room for one too many."""
        outcomes = Outcomes()
        for number in range(MAX_OUTCOMES + 1):
            outcomes.record(an_outcome(f"r{number}.s{number}"))
        assert outcomes.find("r0", "") is None
        assert outcomes.find("s1", "") is not None
        assert outcomes.find(f"r{MAX_OUTCOMES}", "") is not None

    def test_the_latest_of_a_request_id(self) -> None:
        """A client may use its request id again."""
        outcomes = Outcomes()
        outcomes.record(an_outcome("r.1"))
        outcomes.record(an_outcome("r.2"))
        latest = outcomes.find("r", "")
        assert latest is not None
        assert latest.id == "r.2"

    def test_only_a_done_request_is_amended(self) -> None:
        """The GPU worker's own account of a failure is not replaced; a Cancel for an unknown request has no effect."""
        outcomes = Outcomes()
        failed = an_outcome(status="failed", error=SpeechError(code="synthesis_failed", message="broke"))
        outcomes.record(failed)
        outcomes.amend("r.1", None)
        outcomes.amend("unknown", ERROR)
        assert outcomes.find("1", "") == failed

    def test_a_long_message_is_cut(self) -> None:
        """No message of an exception fills the memory."""
        outcomes = Outcomes()
        outcomes.record(an_outcome(status="failed", error=SpeechError(code="c", message="x" * 100_000)))
        kept = outcomes.find("1", "")
        assert kept is not None
        assert kept.error is not None
        assert len(kept.error.message) == MAX_MESSAGE + 1
