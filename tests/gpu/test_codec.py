"""The codec on a CUDA device: the official waveform there too, from captured graphs, without a look at the host."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gpu_worker.engines.qwen.codec import Codec, DecoderState, StreamSnapshot
from shared.pcm import FRAME_SAMPLES
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.codec.test_codec import TOLERANCE, difference, one_shot, some_codes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """float32 means float32, in products and in convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module", params=["torch", "triton"])
def codec(request: pytest.FixtureRequest) -> Iterator[Codec]:
    """The small codec on the device, computed by either kernels."""
    yield Codec(tiny("base"), dtype=torch.float32, device=CUDA, kernels=request.param)
    torch.cuda.empty_cache()


def stream(codec: Codec, codes: Tensor, slot: int, state: DecoderState, chunk: int) -> Tensor:
    """Decode `codes` in chunks; the concatenated waveform on the host, float32 [samples]."""
    slots = torch.tensor([slot], device=CUDA)
    return torch.cat([codec.decode(part[None].to(CUDA), slots, state)[0] for part in codes.split(chunk)]).cpu()


@pytest.mark.parametrize(("chunk", "frames"), [(1, 160), (3, 160), (8, 700)])
def test_any_split_gives_the_official_waveform(codec: Codec, chunk: int, frames: int) -> None:
    """Against the official decoder on the CPU, in one shot."""
    wave = stream(codec, some_codes(1, frames), 1, codec.new_state(2), chunk)

    assert difference(wave, one_shot(1, frames)) <= TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 4, 8])
def test_a_captured_chunk_continues_streams_at_different_positions(codec: Codec, chunk: int) -> None:
    """One graph over static inputs, replayed: mixed positions beside padding rows give what each stream gives alone."""
    state = codec.new_state(4)
    starts = {2: 0, 0: 80, 3: 8}
    codes = torch.zeros(4, chunk, 16, dtype=torch.int64, device=CUDA)
    slots = torch.full((4,), state.scratch, device=CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            codec.decode(codes, slots, state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wave = codec.decode(codes, slots, state)
    for slot, start in starts.items():
        stream(codec, some_codes(slot, 125)[:start], slot, state, 8) if start else state.reset(slot)
    slots[:3] = torch.tensor(list(starts), device=CUDA)

    heard = []
    for step in range(0, 40, chunk):
        parts = [some_codes(slot, 125)[start + step : start + step + chunk] for slot, start in starts.items()]
        codes[:3] = torch.stack(parts).to(CUDA)
        graph.replay()
        heard.append(wave[:3].cpu())

    for row, (slot, start) in enumerate(starts.items()):
        expected = one_shot(slot, 125)[start * FRAME_SAMPLES : (start + 40) * FRAME_SAMPLES]
        assert difference(torch.cat(heard, 1)[row], expected) <= TOLERANCE


def test_decoding_never_waits_for_the_device(codec: Codec) -> None:
    """Any synchronisation inside a chunk is an error here."""
    state = codec.new_state(2)
    codes, slots = some_codes(1, 8)[None].to(CUDA), torch.tensor([1], device=CUDA)
    codec.decode(codes, slots, state)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        codec.decode(codes, slots, state)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_primed_snapshot_survives_the_host(codec: Codec) -> None:
    """A reference's state, kept in host memory and put into another slot, continues the reference."""
    state = codec.new_state(3)
    codec.prime(some_codes(5, 180)[:150], 0, state)
    state.restore(2, StreamSnapshot(*(tensor.cpu() for tensor in state.snapshot(0).tensors())))

    wave = stream(codec, some_codes(5, 180)[150:], 2, state, 7)

    assert difference(wave, one_shot(5, 180)[150 * FRAME_SAMPLES :]) <= TOLERANCE


def test_bfloat16_stays_close() -> None:
    """Noise at least 20 dB below the float32 waveform, as on the CPU."""
    half = Codec(tiny("base"), dtype=torch.bfloat16, device=CUDA)

    wave = stream(half, some_codes(1, 160)[:40], 0, half.new_state(1), 8)

    expected = one_shot(1, 160)[: wave.shape[0]]
    assert float((wave - expected).square().mean()) < 0.01 * float(expected.var())
