from types import SimpleNamespace
from typing import Any

import torch

from gpu_worker.engines.qwen.kernels.embed_frame import embed_frame
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from tests.gpu_worker.engines.qwen.kernels.interpreter import each_dtype, interpreted


@interpreted
@each_dtype("width", [300, 16, 1024])
def test_the_kernel_equals_torch(dtype: torch.dtype, width: int) -> None:
    """Bit for bit: both round after the codes' sum and after the text. Frames go round in the ring buffer."""
    generator = torch.Generator().manual_seed(width)
    slots, batch, groups, vocabulary = 4, 3, 16, 10
    # Sixteenths up to 8: their sums are exact in float32, in any order.
    table = (torch.randint(-128, 128, (groups * vocabulary, width), generator=generator) / 16).to(dtype)
    trailing = torch.randn(slots, 6, width, generator=generator).to(dtype)
    offsets = vocabulary * torch.arange(groups)
    codes = torch.randint(vocabulary, (batch, groups), generator=generator)

    def state() -> Any:
        return SimpleNamespace(
            frame=torch.tensor([3, 16, 41, 0]),
            trailing_len=torch.tensor([5, 5, 2, 0]),
            trailing=trailing,
            talker_input=torch.zeros(slots, width, dtype=dtype),
            ring_buffer=torch.full((slots, 16, groups), -1),
        )

    ours, theirs = state(), state()
    made = fused_kernels().embed_frame(ours, codes, table, offsets)
    wanted = embed_frame(theirs, codes, table, offsets)
    assert torch.equal(made, wanted)
    assert torch.equal(ours.talker_input, theirs.talker_input)
    assert torch.equal(ours.ring_buffer, theirs.ring_buffer)
    assert [int(row.max(-1).values.argmax()) for row in ours.ring_buffer[:3]] == [3, 0, 9]
