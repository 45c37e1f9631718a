import numpy as np
import pytest
import torch

from gpu_worker.engines.base import Job
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.passages import Passage
from gpu_worker.engines.qwen.planner import Plan, Utterance
from gpu_worker.engines.qwen.sequence import MAX_SILENT_FRAMES, RunningJob, most_urgent_first
from shared.protocol import Segment
from tests.gpu_worker.engines.qwen.parity import GREEDY


def utterance(max_frames: int) -> Utterance:
    """An utterance of seven text tokens."""
    return Utterance(Prompt(torch.zeros(5, 2), torch.zeros(0, 2)), 7, max_frames)


def running_job(max_frames: int = 100, max_new_tokens: int | None = None) -> RunningJob:
    """A job of two utterances; the first one is generating."""
    plan = Plan(
        passages=iter([Passage("a"), Passage("b")]),
        longest_tokens=7,
        sampling=GREEDY,
        seed=0,
        max_new_tokens=max_new_tokens,
        whole_text=True,
    )
    sequence = RunningJob(Job(id="j", task="CustomVoice", segments=[Segment(text="a")]), 0, plan)
    sequence.start_utterance(utterance(max_frames))
    sequence.on_prefilled()
    return sequence


def test_chunks_grow_from_one_frame_to_eight() -> None:
    """The chunks have 1, 1, 2, 4, 8, 8 frames; the rest of an utterance is split into chunks of these lengths."""
    sequence = running_job()
    sizes = []
    for frame in range(31):
        sequence.on_frame_ready(last=frame == 30)
        while sequence.chunk_due:
            sizes.append(sequence.next_chunk)
            sequence.on_chunk_decoded()
    assert sizes == [1, 1, 2, 4, 8, 8, 4, 2, 1]
    assert sequence.ended
    assert (sequence.reason, sequence.usage.output_tokens, sequence.usage.input_tokens) == ("stop", 31, 7)


@pytest.mark.parametrize(("frames", "chunks"), [(1, 1), (3, 2), (9, 2), (30, 5)])
def test_only_the_edges_of_an_utterance_are_faded(frames: int, chunks: int) -> None:
    """The first chunk begins near zero and the last one ends there; all of them are decoded before one is delivered."""
    sequence = running_job()
    loud = np.full(1920, 8_000, np.int16)
    for frame in range(frames):
        sequence.on_frame_ready(last=frame == frames - 1)
    while sequence.chunk_due:
        sequence.on_chunk_decoded()
    faded = [sequence.faded(loud) for _ in range(sequence.chunks)]
    assert [chunk[0] < 100 for chunk in faded] == [True, *[False] * (chunks - 1)]
    assert [chunk[-1] < 100 for chunk in faded] == [*[False] * (chunks - 1), True]
    assert all((chunk[200:-200] == 8_000).all() for chunk in faded)


def test_the_frame_cap_ends_an_utterance_with_length() -> None:
    """The job ends with `length` even if a later utterance ends by itself."""
    sequence = running_job(max_frames=2)
    sequence.on_frame_ready(last=False)
    sequence.on_frame_ready(last=False)
    assert sequence.ended
    sequence.start_utterance(utterance(10))
    sequence.on_frame_ready(last=True)
    assert sequence.reason == "length"


@pytest.mark.parametrize(("frames", "ended", "reason"), [(3, True, "length"), (4, False, "stop")])
def test_the_requests_limit_counts_the_frames_of_all_utterances(frames: int, ended: bool, reason: str) -> None:  # noqa: FBT001 -- a parameter
    """If an utterance ends at the limit, the next one is not spoken, and the reason is `length`."""
    sequence = running_job(max_new_tokens=frames)
    for frame in range(3):
        sequence.on_frame_ready(last=frame == 2)
    sequence.on_chunk_decoded()
    sequence.finish_utterance()
    passage = sequence.look_ahead()
    assert passage is not None
    assert (not passage.text, sequence.reason, sequence.frames_left) == (ended, reason, frames - 3)


def test_the_earliest_underrun_is_decoded_first() -> None:
    """A job without delivered audio comes first. A player that ran dry plays the next chunk from its delivery on."""
    new, ahead, behind, dry = (running_job() for _ in range(4))
    dry.on_delivered(0.08, now=1.0)
    ahead.on_delivered(0.64, now=10.0)
    ahead.on_delivered(0.64, now=10.1)
    behind.on_delivered(0.64, now=10.2)
    dry.on_delivered(0.32, now=10.3)
    assert (ahead.underrun_at, dry.underrun_at) == (pytest.approx(11.28), pytest.approx(10.62))
    assert most_urgent_first([[ahead], [behind, new], [dry]]) == [[behind, new], [dry], [ahead]]


def test_only_uninterrupted_silence_counts() -> None:
    """A single audible frame restarts the count."""
    sequence = running_job()
    quiet, loud = np.full(10 * MAX_SILENT_FRAMES, 20, dtype=np.int16), np.full(10, -32768, dtype=np.int16)
    sequence.check_silence(quiet[:-10], 10)
    sequence.check_silence(loud, 10)
    sequence.check_silence(quiet[:-10], 10)
    assert not sequence.ended
    sequence.check_silence(quiet[:10], 10)
    assert sequence.ended
    assert sequence.reason == "length"
