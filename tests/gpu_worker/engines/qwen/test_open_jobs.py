"""Jobs whose text is still being written: they speak what the whole text would, and wait where it is missing."""

import msgspec

from gpu_worker.engines.base import Done, Job
from gpu_worker.engines.qwen.engine import QwenEngine
from shared.pcm import EMPTY_S, bytes_for
from shared.protocol import Sampling, Segment
from tests.gpu_worker.engines.qwen.driving import Outcome, job, run, take

TEXT = "Hello world, good morning."


def opened(whole: Job) -> Job:
    """The job with the same voice and seed, to which the text has not come yet."""
    return msgspec.structs.replace(whole, segments=[], open=True, non_streaming_mode=None)


def streamed(number: int, text: str = TEXT, **fields: object) -> Job:
    """A job of the layout that reads its text frame by frame."""
    return job(number, text, non_streaming_mode=False, **fields)


def drain(speaker: QwenEngine, outcomes: dict[str, Outcome]) -> None:
    """Step until nothing is left to do."""
    while speaker.runnable(()):
        take(speaker, outcomes, 0)


def test_pieces_and_flushes(speaker: QwenEngine) -> None:
    """A flush ends an utterance, as the end of a segment does."""
    whole = streamed(3, segments=[Segment(text="Hello world."), Segment(text="Good morning.")])
    wanted = run(speaker, [whole])[whole.id]
    outcomes = {whole.id: Outcome()}
    speaker.admit(opened(whole))
    for piece, flush in (("Hel", False), ("lo world.", True), ("Good mor", False), ("ning.", False)):
        speaker.append(whole.id, piece, flush=flush)
        drain(speaker, outcomes)
        assert speaker.waits_for_text(whole.id)
    speaker.end_text(whole.id)
    drain(speaker, outcomes)
    assert outcomes[whole.id].pcm == wanted.pcm
    assert outcomes[whole.id].end == wanted.end


def test_a_text_without_a_word(speaker: QwenEngine) -> None:
    """It ends with a moment of silence."""
    for piece in ("", " \n", "--- …"):
        outcomes = {"job 1": Outcome()}
        speaker.admit(opened(streamed(1)))
        speaker.append("job 1", piece, flush=True)
        speaker.append("job 1", piece, flush=False)
        speaker.end_text("job 1")
        drain(speaker, outcomes)
        assert outcomes["job 1"].pcm == bytes(bytes_for(EMPTY_S))
        assert isinstance(outcomes["job 1"].end, Done)
        assert outcomes["job 1"].end.reason == "empty"


def test_a_limit_on_frames_ends_the_job_when_more_text_comes(speaker: QwenEngine) -> None:
    """An utterance may end at the limit: whether the speech was cut shows when the next text comes."""
    whole = streamed(
        1, segments=[Segment(text="Hello."), Segment(text="World.")], sampling=Sampling(seed=1, max_new_tokens=3)
    )
    wanted = run(speaker, [whole])[whole.id]
    outcomes = {whole.id: Outcome()}
    speaker.admit(opened(whole))
    speaker.append(whole.id, "Hello.", flush=True)
    drain(speaker, outcomes)
    assert outcomes[whole.id].end is None
    speaker.append(whole.id, "World.", flush=False)
    speaker.end_text(whole.id)
    drain(speaker, outcomes)
    assert outcomes[whole.id].end == wanted.end
    assert outcomes[whole.id].pcm == wanted.pcm
