"""The rows of the ring that a frame attends to."""

import pytest
import torch

from gpu_worker.engines.qwen.codec.transformer import Window

SPAN, CHUNK, ROWS = 72, 8, 80


@pytest.mark.parametrize("position", [0, 1, 64, 70, 71, 72, 79, 80, 81, 640, 12_345])
def test_a_frame_attends_to_itself_and_the_71_before_it(position: int) -> None:
    """For each frame of a chunk, the unmasked rows of the ring hold exactly the frames of its window."""
    kv_rings = torch.zeros(1, 2, ROWS, 2, 1, 4)
    rope = (torch.zeros(4), torch.ones(4))
    window = Window(kv_rings, torch.tensor([1]), torch.tensor([position]), CHUNK, rope)
    held = {frame % ROWS: frame for frame in range(position + CHUNK)}  # later frames overwrite earlier ones

    mask = window.mask(SPAN)

    assert mask.shape == (1, 1, CHUNK, ROWS)
    for step in range(CHUNK):
        frame = position + step
        seen = sorted(held[row] for row in (mask[0, 0, step] == 0).nonzero().flatten().tolist())
        assert seen == list(range(max(0, frame - SPAN + 1), frame + 1))
    assert window.ring_rows.tolist() == [ROWS + (position + step) % ROWS for step in range(CHUNK)]
