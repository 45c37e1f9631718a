import numpy as np
import pytest
import torch

from gpu_worker.engines.base import Job
from gpu_worker.engines.qwen.planner import Plan
from gpu_worker.engines.qwen.prompt import Prompt
from gpu_worker.engines.qwen.speaking import SILENCE_FRAMES, Speaking, frame_cap
from tests.gpu_worker.engines.qwen.parity import GREEDY


def speaking(cap: int = 100) -> Speaking:
    """A job whose first utterance has begun."""
    plan = Plan(texts=["a", "b"], tokens=7, choice=GREEDY, seed=0, max_new_tokens=9, whole_text=True)
    made = Speaking(Job(id="j", task="CustomVoice", text="a"), 0, plan, None)
    made.begin(Prompt(torch.zeros(5, 2), torch.zeros(0, 2)), cap)
    made.start()
    return made


def test_chunks_grow_from_one_frame_to_eight() -> None:
    """1, 2, 4, 8, 8 frames, and a shorter one at the end."""
    one = speaking()
    sizes = []
    for frame in range(26):
        one.land(last=frame == 25)
        if one.due:
            sizes.append(one.pending)
            one.take_chunk()
    assert sizes == [1, 2, 4, 8, 8, 3]
    assert one.ended
    assert (one.reason, one.usage.output_tokens, one.usage.input_tokens) == ("stop", 26, 7)


def test_the_cap_ends_an_utterance_with_length() -> None:
    """Also where the reason for another utterance would have been `stop`."""
    one = speaking(cap=2)
    one.land(last=False)
    one.land(last=False)
    assert one.ended
    one.begin(Prompt(torch.zeros(5, 2), torch.zeros(0, 2)), 10)
    one.land(last=True)
    assert one.reason == "length"


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
