"""Slots of decoder state: copied, restored and moved, each without changing the others."""

import torch

from gpu_worker.engines.qwen.codec import Codec, DecoderState
from tests.checkpoints import tiny


def decoded(codec: Codec, state: DecoderState, slot: int, seed: int, frames: int) -> torch.Tensor:
    """The waveform of random codes that continue the stream in `slot`."""
    codes = torch.randint(0, 2048, (1, frames, 16), generator=torch.Generator().manual_seed(seed))
    return codec.decode(codes, torch.tensor([slot]), state)


def test_a_snapshot_continues_in_any_slot_any_number_of_times() -> None:
    """A restored stream continues bit for bit as the original stream did."""
    codec = Codec(tiny("base"), dtype=torch.float32, device=torch.device("cpu"))
    state = codec.new_state(3)
    for seed in range(12):  # 96 frames: the ring has wrapped
        decoded(codec, state, 0, seed, 8)
    snapshot = state.snapshot(0)
    expected = decoded(codec, state, 0, 100, 8)
    for seed in range(20, 30):  # the stream continues, and the snapshot must not change
        decoded(codec, state, 0, seed, 8)

    other = codec.new_state(1)
    decoded(codec, other, 0, 5, 3)
    for target, slot in ((state, 0), (state, 2), (other, 0)):
        target.restore(slot, snapshot)
        assert torch.equal(decoded(codec, target, slot, 100, 8), expected)


def test_a_reset_clears_one_slot_alone() -> None:
    """`reset` zeroes all tensors of its slot and no others."""
    codec = Codec(tiny("base"), dtype=torch.float32, device=torch.device("cpu"))
    state = codec.new_state(2)
    for slot in (0, 1):
        decoded(codec, state, slot, slot, 8)
    kept = state.snapshot(1)

    state.reset(0)

    cleared, still = state.snapshot(0), state.snapshot(1)
    assert not cleared.kv_rings.any()
    assert not cleared.history.any()
    assert int(cleared.positions) == 0
    assert torch.equal(still.kv_rings, kept.kv_rings)
    assert torch.equal(still.history, kept.history)
    assert int(still.positions) == 8


def test_bytes_count_the_tensors() -> None:
    """A state has one slot more than requested. A snapshot has the bytes of one slot."""
    codec = Codec(tiny("base"), dtype=torch.float32, device=torch.device("cpu"))
    state = codec.new_state(4)

    assert state.bytes == sum(tensor.nbytes for tensor in state.tensors())
    assert state.bytes == 5 * sum(tensor.nbytes for tensor in state.snapshot(0).tensors())
