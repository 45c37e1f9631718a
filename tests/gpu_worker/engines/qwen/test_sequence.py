import numpy as np
import pytest
import torch

from gpu_worker.engines.base import Job
from gpu_worker.engines.qwen.model.prompt import Prompt
from gpu_worker.engines.qwen.planner import Plan, Utterance
from gpu_worker.engines.qwen.sequence import SILENCE_FRAMES, RunningJob, frame_cap, most_urgent_first
from tests.gpu_worker.engines.qwen.parity import GREEDY


def utterance(cap: int) -> Utterance:
    """Seven tokens of text."""
    return Utterance(Prompt(torch.zeros(5, 2), torch.zeros(0, 2)), 7, cap)


def speaking(cap: int = 100, max_new_tokens: int | None = None) -> RunningJob:
    """A job of two utterances, the first of which has begun."""
    plan = Plan(
        texts=iter(["a", "b"]), longest=7, choice=GREEDY, seed=0, max_new_tokens=max_new_tokens, whole_text=True
    )
    made = RunningJob(Job(id="j", task="CustomVoice", text="a"), 0, plan)
    made.begin(utterance(cap))
    made.start()
    return made


def test_chunks_grow_from_one_frame_to_eight() -> None:
    """1, 1, 2, 4, 8, 8 frames, and a shorter one at the end."""
    one = speaking()
    sizes = []
    for frame in range(26):
        one.land(last=frame == 25)
        if one.due:
            sizes.append(one.pending)
            one.take_chunk()
    assert sizes == [1, 1, 2, 4, 8, 8, 2]
    assert one.ended
    assert (one.reason, one.usage.output_tokens, one.usage.input_tokens) == ("stop", 26, 7)


def test_the_cap_ends_an_utterance_with_length() -> None:
    """Also where the reason for another utterance would have been `stop`."""
    one = speaking(cap=2)
    one.land(last=False)
    one.land(last=False)
    assert one.ended
    one.begin(utterance(10))
    one.land(last=True)
    assert one.reason == "length"


@pytest.mark.parametrize(("frames", "ended", "reason"), [(3, True, "length"), (4, False, "stop")])
def test_the_requests_cap_counts_the_frames_of_all_utterances(frames: int, ended: bool, reason: str) -> None:  # noqa: FBT001 -- a parameter
    """Where they are used up when an utterance ends, what follows is not said, and the reason tells."""
    one = speaking(max_new_tokens=frames)
    for frame in range(3):
        one.land(last=frame == 2)
    one.take_chunk()
    assert (one.finish(), one.reason, one.left) == (ended, reason, frames - 3)


def test_whose_playback_runs_out_first_is_decoded_first() -> None:
    """Who has heard nothing yet, then who has the least left to play; one that ran dry counts from its next chunk."""
    new, ahead, behind, dry = (speaking() for _ in range(4))
    dry.plays(0.08, now=1.0)
    ahead.plays(0.64, now=10.0)
    ahead.plays(0.64, now=10.1)
    behind.plays(0.64, now=10.2)
    dry.plays(0.32, now=10.3)
    assert (ahead.dry_at, dry.dry_at) == (pytest.approx(11.28), pytest.approx(10.62))
    assert most_urgent_first([[ahead], [behind, new], [dry]]) == [[behind, new], [dry], [ahead]]


def test_silence_counts_only_without_a_break() -> None:
    """A single audible frame starts the count anew."""
    one = speaking()
    quiet, loud = np.full(10 * SILENCE_FRAMES, 20, dtype=np.int16), np.full(10, -32768, dtype=np.int16)
    one.hear(quiet[:-10], 10)
    one.hear(loud, 10)
    one.hear(quiet[:-10], 10)
    assert not one.ended
    one.hear(quiet[:10], 10)
    assert one.ended
    assert one.reason == "length"


@pytest.mark.parametrize(
    ("tokens", "wanted", "room", "cap"),
    [(1, 2048, 2000, 192), (50, 2048, 2000, 600), (50, 10, 2000, 10), (50, 2048, 99, 99)],
)
def test_the_cap_follows_the_text(tokens: int, wanted: int, room: int, cap: int) -> None:
    """max(192, 12 frames a token), at most what was asked for and what the slot holds."""
    assert frame_cap(tokens, wanted, room) == cap
