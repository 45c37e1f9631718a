"""Each convolutional piece in chunks, compared with torch's convolution of the whole."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.codec.convolution import (
    UNFOLD_UP_TO_RATE,
    CausalConv,
    History,
    ResidualUnit,
    ToMono,
    Upsample,
    receptive_frames,
)
from gpu_worker.engines.qwen.kernels.selection import Kernels

CHUNKS = (1, 2, 5, 3, 9)


def reduced_to_bfloat16(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the weight in bfloat16."""
    return given | {"c.conv.weight": given["c.conv.weight"].bfloat16()}


def weights(*shape: int, outputs: int) -> dict[str, Tensor]:
    """A convolution's weight and bias as a checkpoint names them."""
    torch.manual_seed(0)
    return {"c.conv.weight": torch.randn(shape), "c.conv.bias": torch.randn(outputs)}


def in_chunks(piece: CausalConv | Upsample | ToMono, x: Tensor) -> Tensor:
    """Run `piece` over x [batch, time, channels] in uneven chunks."""
    values = torch.zeros(x.shape[0], piece.history_size)
    return torch.cat([piece(part, History(values, values, Kernels())) for part in x.split(CHUNKS, 1)], 1)


@pytest.mark.parametrize("rate", [1, UNFOLD_UP_TO_RATE["cpu"] + 1])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (7, 3), (7, 9)])
def test_causal_convolutions_continue_across_chunks(rate: int, taps: int, dilation: int) -> None:
    """Chunks give the convolution of the whole, padded on the left, as a product of windows or directly."""
    given = weights(5, 4, taps, outputs=5)
    x = torch.randn(2, sum(CHUNKS), 4)

    y = in_chunks(CausalConv(given, "c", rate=rate, dilation=dilation), x)

    padded = functional.pad(x.transpose(1, 2), ((taps - 1) * dilation, 0))
    expected = functional.conv1d(padded, given["c.conv.weight"], given["c.conv.bias"], dilation=dilation)
    torch.testing.assert_close(y, expected.transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (6, 3), (16, 8)])
def test_transposed_convolutions_continue_across_chunks(kernel: int, stride: int) -> None:
    """Chunks give the transposed convolution of the whole, cut on the right, with the bias added once."""
    given = weights(4, 5, kernel, outputs=5)
    x = torch.randn(2, sum(CHUNKS), 4)

    y = in_chunks(Upsample(given, "c", rate=1, stride=stride), x)

    whole = functional.conv_transpose1d(x.transpose(1, 2), given["c.conv.weight"], given["c.conv.bias"], stride)
    torch.testing.assert_close(y, whole[..., : sum(CHUNKS) * stride].transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
@pytest.mark.parametrize(("rate", "size", "taps", "dilation"), [(4, 64, 7, 1), (32, 768, 7, 9), (160, 384, 1, 1)])
def test_convolutions_in_bfloat16_do_not_depend_on_split_and_batch(
    rate: int, size: int, taps: int, dilation: int
) -> None:
    """A row has the same bits in each chunk length of the engine, alone and in company, and float32's value nearly."""
    given = weights(size, size, taps, outputs=size)
    exact = CausalConv(given, "c", rate=rate, dilation=dilation)
    reduced = CausalConv(reduced_to_bfloat16(given), "c", rate=rate, dilation=dilation)
    x = torch.randn(3, exact.past_rows + 8 * rate, size)

    together = reduced.of_extended(x)

    for frames in (1, 2, 4, 8):
        alone = reduced.of_extended(x[:1, : exact.past_rows + frames * rate])
        assert torch.equal(alone, together[:1, : frames * rate])
    wanted = exact.of_extended(x)
    assert together.dtype == torch.float32
    assert 0 < float((together - wanted).norm() / wanted.norm()) < 0.005


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")
def test_transposed_convolutions_in_bfloat16_give_nearly_the_same() -> None:
    """Chunks continue each other, and the bias is added once."""
    given = weights(64, 32, 10, outputs=32)
    x = torch.randn(2, sum(CHUNKS), 64)

    reduced = in_chunks(Upsample(reduced_to_bfloat16(given), "c", rate=4, stride=5), x)

    wanted = in_chunks(Upsample(given, "c", rate=4, stride=5), x)
    assert 0 < float((reduced - wanted).norm() / wanted.norm()) < 0.005


def test_the_convolution_to_one_channel_continues_across_chunks() -> None:
    """Projecting the rows and summing diagonals is the same convolution."""
    given = weights(1, 4, 7, outputs=1)
    x = torch.randn(2, sum(CHUNKS), 4)

    y = in_chunks(ToMono(given, "c", rate=1), x)

    padded = functional.pad(x.transpose(1, 2), (6, 0))
    expected = functional.conv1d(padded, given["c.conv.weight"], given["c.conv.bias"])
    torch.testing.assert_close(y, expected[:, 0], atol=1e-5, rtol=0)


def test_a_bias_that_is_left_to_snake_is_added_there() -> None:
    """As on CUDA, where the direct convolution would add it in a kernel of its own: the output is the same."""
    torch.manual_seed(0)
    given = {f"u.act{act}.{name}": torch.randn(4) for act in (1, 2) for name in ("alpha", "beta")}
    for number, taps in ((1, 7), (2, 1)):
        given |= {f"u.conv{number}.conv.weight": torch.randn(4, 4, taps), f"u.conv{number}.conv.bias": torch.randn(4)}
    rate = UNFOLD_UP_TO_RATE["cpu"] + 1
    unit = ResidualUnit(given, "u", rate=rate, dilation=3, kernels=Kernels())
    x, values = torch.randn(2, rate, 4), torch.zeros(2, unit.history_size)

    wanted, _ = unit(x, None, History(values.clone(), values.clone(), Kernels()))
    unit.dilated.left_bias, unit.dilated.bias = unit.dilated.bias, None
    y, added = unit(x, None, History(values.clone(), values.clone(), Kernels()))

    assert added is None
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=0)


def test_the_receptive_field_of_a_chain_is_the_sum_of_its_pieces() -> None:
    """A partial frame counts as one, and one frame is added."""
    assert receptive_frames([3.0, 1.5, 0.25]) == 6
