"""The spans of a request in the GPU worker: their tree, their times and what they tell."""

import pytest

from gpu_worker.request_traces import RequestTraces
from shared.protocol import SpeechError
from tests.gpu_worker.worker_bench import FAULT, MakeBench, WorkerBench, loaded
from tests.spans import CLIENT, TRACE, TRACEPARENT, KeptTraces, attributes, parent_id, span_id, trace_id

TREE = {"speak": CLIENT, "queue": "speak", "first_audio": "speak", "rest": "speak"}


@pytest.fixture
def kept() -> KeptTraces:
    """The spans of the worker."""
    return KeptTraces()


@pytest.fixture
def traced(make_bench: MakeBench, kept: KeptTraces) -> WorkerBench:
    """A worker with one slot whose model takes two seconds to load."""
    bench = make_bench(slots=1)
    bench.load_s = 2.0
    bench.on_request_over = RequestTraces(kept.traces, bench.clock).record
    return bench


def tree(kept: KeptTraces) -> dict[str, str]:
    """The name of each span's parent, or the id of a span outside."""
    names = {span_id(span): span.name for span in kept.spans}
    return {span.name: names.get(parent_id(span), parent_id(span)) for span in kept.spans}


def seconds(kept: KeptTraces, name: str) -> float:
    """How long the only span of that name took."""
    span = kept.one(name)
    assert span.start_time is not None
    assert span.end_time is not None
    return round((span.end_time - span.start_time) / 1e9, 6)


def test_speech(traced: WorkerBench, kept: KeptTraces) -> None:
    """All spans are below that of the web worker, and their times are those of the request."""
    loaded(traced)
    traced.engines["m"].step_s = 0.25
    traced.speak("my.id.5eec", "one two three", traceparent=TRACEPARENT)
    traced.settle()
    assert tree(kept) == TREE
    assert {trace_id(span) for span in kept.spans} == {TRACE}
    assert seconds(kept, "queue") == 0
    assert (seconds(kept, "first_audio"), seconds(kept, "rest"), seconds(kept, "speak")) == (0.25, 0.5, 0.75)
    assert kept.one("rest").end_time == kept.one("speak").end_time
    told = attributes(kept.one("speak"))
    assert told.pop("tts.audio_seconds") > 0
    assert told == {"tts.model": "m", "tts.speech_id": "5eec", "tts.outcome": "finished"}


def test_a_load(traced: WorkerBench, kept: KeptTraces) -> None:
    """The load is a part of the wait in the queue."""
    traced.speak("r", "one", traceparent=TRACEPARENT)
    traced.settle()
    assert tree(kept) == {**TREE, "load": "queue"}
    assert seconds(kept, "load") <= seconds(kept, "queue")


def test_a_failure(traced: WorkerBench, kept: KeptTraces) -> None:
    """The span has the code of the error, and not its message."""
    loaded(traced)
    traced.speak("r", FAULT, traceparent=TRACEPARENT)
    traced.settle()
    told = attributes(kept.one("speak"))
    assert (told["tts.outcome"], told["error.type"]) == ("failed", "invalid_audio")
    assert "cannot be said" not in kept.text()
    assert tree(kept).keys() == {"speak", "queue", "first_audio"}


@pytest.mark.parametrize("error", [None, SpeechError(code="internal_error", message="m")])
def test_cancelled_in_the_queue(traced: WorkerBench, kept: KeptTraces, error: SpeechError | None) -> None:
    """It waited until its end, and has no other times; a client that left is no error."""
    loaded(traced)
    traced.speak("a", "one two three", credit=0)
    traced.speak("r", "one", traceparent=TRACEPARENT)
    traced.worker.turn()
    traced.clock.advance(3.0)
    traced.cancel("r", error=error)
    traced.worker.turn()
    assert tree(kept) == {"speak": CLIENT, "queue": "speak"}
    assert attributes(kept.one("speak")).get("error.type") == (error and error.code)
    assert kept.one("speak").status.is_unset == (error is None)


def test_nothing_of_the_client_is_in_a_span(traced: WorkerBench, kept: KeptTraces) -> None:
    """Neither its text, nor its name, nor its voice, nor its own request id."""
    loaded(traced)
    traced.speak("own-request.5eec", "a secret", client="key:alice", traceparent=TRACEPARENT, instructions="whisper")
    traced.settle()
    for word in ("secret", "alice", "whisper", "own-request"):
        assert word not in kept.text()


@pytest.mark.parametrize("context", ["", TRACEPARENT[:-2] + "00"])
def test_not_traced(traced: WorkerBench, kept: KeptTraces, context: str) -> None:
    """A request without a trace that is kept has no spans."""
    loaded(traced)
    traced.speak("r", "one", traceparent=context)
    traced.settle()
    assert kept.spans == []
    assert traced.kinds("r")[-1] == "Finished"


def test_an_exemplar_has_the_trace(traced: WorkerBench) -> None:
    """The latest request of a bucket leads to its trace."""
    loaded(traced)
    traced.speak("r", "one", traceparent=TRACEPARENT)
    traced.settle()
    exemplars = traced.snapshot().model_stats["m"].first_audio_s.exemplars.values()
    assert ("r", TRACE) in [(exemplar.speech_id, exemplar.trace_id) for exemplar in exemplars]
