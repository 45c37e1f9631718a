"""The convolutional pieces of the codec decoder, each causal and continued from chunk to chunk.

Everything is [batch, time, channels]: a convolution is then a matrix product over windows of rows,
and a transposed one is a product whose output rows are `stride` samples long.
What a piece needs of the chunk before comes from `History`; no piece keeps anything itself.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.model.layers import Linear, TensorHolder

UNFOLD_UP_TO_RATE: Final = {"cpu": 160, "cuda": 32}
"""Convolutions over at most this many rows a frame are one matrix product over copied windows, others a direct kernel.

CPU: measured on one core of an AMD EPYC (Zen 4), float32, published sizes. At 4 to 32 rows the product over packed
weights takes half the direct kernel's time, at 160 they are equal, above that copying windows costs more than it saves.
CUDA: derived, not measured. Windows at 160 rows would be 440 MB for 64 streams of 8 frames in bfloat16.
"""


SNAKE_WIDTH: Final = 256
"""Values that one pass of an elementwise kernel should have on end; a few channels alone leave it no room to."""


class History:
    """What causal convolutions remember between chunks, taken and renewed in order of execution."""

    def __init__(self, values: Tensor) -> None:
        """values: [batch, n]; renewed in place as the convolutions pass."""
        self._values = values
        self._offset = 0

    def extend(self, x: Tensor, rows: int) -> Tensor:
        """[batch, time, channels] -> [batch, rows + time, channels], the last rows of the chunk before in front."""
        size = rows * x.shape[2]
        kept = self._values[:, self._offset : self._offset + size].unflatten(1, (rows, x.shape[2]))
        self._offset += size
        x = torch.cat((kept, x), 1)
        kept.copy_(x[:, -rows:])
        return x


def windows(x: Tensor, taps: int, dilation: int) -> Tensor:
    """Sliding windows over time, without copying: [batch, time, channels] -> [batch, windows, taps, channels].

    X is contiguous, as what History makes always is.
    """
    batch, time, channels = x.shape
    count = time - (taps - 1) * dilation
    return x.as_strided((batch, count, taps, channels), (time * channels, channels, dilation * channels, 1))


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Weight [out, in] with each output's scale [out] in it, rounded once."""
    return (scale.float()[:, None] * weight.float()).to(weight.dtype)


class Snake(TensorHolder):
    """SnakeBeta: x + sin(x·e^alpha)² / e^beta, by channel. The exponentials are taken once, here.

    Where channels are few, several rows are taken as one: the parameters are repeated as often.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int) -> None:
        alpha, beta = (weights[f"{prefix}.{name}"] for name in ("alpha", "beta"))
        together = math.gcd(rate, max(1, SNAKE_WIDTH // alpha.shape[0]))
        self.frequency = alpha.float().exp().to(alpha.dtype).repeat(together)
        self.magnitude = (1 / (beta.float().exp() + 1e-9)).to(beta.dtype).repeat(together)

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, time, channels] -> the same; time in whole frames."""
        rows = x.reshape(-1, self.frequency.shape[0])
        wave = (rows * self.frequency).sin_()
        return torch.addcmul(rows, wave.square_(), self.magnitude, out=wave).view(x.shape)


class CausalConv(TensorHolder):
    """A convolution over time that sees its row and the `rows` before it.

    `rate` is how many rows there are to a frame.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int, dilation: int = 1) -> None:
        weight, self.bias = weights[f"{prefix}.conv.weight"], weights[f"{prefix}.conv.bias"]
        self.taps = weight.shape[2]
        self.dilation = dilation
        self.rows = (self.taps - 1) * dilation
        self.lookback = self.rows / rate
        self.values = self.rows * weight.shape[1]
        by_tap = weight.transpose(1, 2).contiguous()  # [out, taps, in]
        self.kernel: Linear | Tensor
        if rate <= UNFOLD_UP_TO_RATE[weight.device.type]:
            self.kernel = Linear(by_tap.flatten(1), self.bias)
        else:  # [out, in, 1, taps] with channels innermost, for a two-dimensional convolution of height 1
            self.kernel = by_tap.transpose(1, 2)[:, :, None]

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, in] -> [batch, time, out]."""
        if self.rows:
            x = history.extend(x, self.rows)
            if isinstance(self.kernel, Linear):
                x = windows(x, self.taps, self.dilation).flatten(2)
        if isinstance(self.kernel, Linear):
            return self.kernel.batch_invariant(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self._convolve(x.transpose(1, 2)[:, :, None], self.kernel)[:, :, 0].transpose(1, 2)

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available():
            # For one stream torch would choose a slower kernel than oneDNN's: 98 instead of 45 µs a call.
            return torch.mkldnn_convolution(x, kernel, self.bias, (0, 0), (1, 1), (1, self.dilation), 1)
        return functional.conv2d(x, kernel, self.bias, dilation=(1, self.dilation))


class Upsample(TensorHolder):
    """A transposed convolution over time, trimmed on the right as the official one is.

    Each input row makes `stride` output rows, together with the `taps - 1` input rows before it:
    a plain matrix product, in which the bias occurs once.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int, stride: int) -> None:
        weight, bias = weights[f"{prefix}.conv.weight"], weights[f"{prefix}.conv.bias"]
        channels_in, self.channels, kernel = weight.shape
        self.stride = stride
        self.taps = kernel // stride
        self.lookback = (self.taps - 1) / rate
        self.values = (self.taps - 1) * channels_in
        # [in, out, tap, phase] -> [phase, out, tap, in]; tap 0 is the newest row, windows have the oldest first.
        matrix = weight.unflatten(2, (self.taps, stride)).permute(3, 1, 2, 0).flip(2)
        self.product = Linear(matrix.reshape(stride * self.channels, -1).contiguous(), bias.repeat(stride))

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, in] -> [batch, time * stride, out]."""
        batch, time, channels_in = x.shape
        if self.taps > 1:
            x = windows(history.extend(x, self.taps - 1), self.taps, 1)
        y = self.product.batch_invariant(x.reshape(batch * time, self.taps * channels_in))
        return y.view(batch, time * self.stride, self.channels)


class ConvNeXt(TensorHolder):
    """A depthwise convolution of 7 rows, then a two-layer perceptron by row, added to the input."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int) -> None:
        def pair(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"]

        depthwise, self.depthwise_bias = pair("dwconv.conv")  # [channels, 1, taps]
        self.depthwise = depthwise[:, 0].t().contiguous()
        self.norm_weight, self.norm_bias = pair("norm")
        self.rows = self.depthwise.shape[0] - 1
        self.lookback = self.rows / rate
        self.values = depthwise.numel() // depthwise.shape[2] * self.rows
        self.widen = Linear(*pair("pwconv1"))
        weight, bias = pair("pwconv2")
        gamma = weights[f"{prefix}.gamma"]
        self.narrow = Linear(scaled(weight, gamma), gamma * bias)

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, channels] -> the same."""
        y = (windows(history.extend(x, self.rows), self.rows + 1, 1) * self.depthwise).sum(2) + self.depthwise_bias
        y = functional.layer_norm(y, y.shape[2:], self.norm_weight, self.norm_bias, 1e-6)
        y = self.narrow.batch_invariant(functional.gelu(self.widen.batch_invariant(y.flatten(0, 1))))
        return y.view_as(x) + x


class ResidualUnit(TensorHolder):
    """Snake, dilated convolution of 7 rows, Snake, convolution of 1 row, added to the input."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int, dilation: int) -> None:
        self.first = Snake(weights, f"{prefix}.act1", rate=rate)
        self.dilated = CausalConv(weights, f"{prefix}.conv1", rate=rate, dilation=dilation)
        self.second = Snake(weights, f"{prefix}.act2", rate=rate)
        self.mix = CausalConv(weights, f"{prefix}.conv2", rate=rate)
        self.lookback = self.dilated.lookback
        self.values = self.dilated.values

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, channels] -> the same."""
        y = self.second(self.dilated(self.first(x), history))
        return self.mix(y, history).add_(x)


class UpsamplingBlock(TensorHolder):
    """Snake, a transposed convolution, and three residual units of growing dilation."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int, stride: int) -> None:
        self.snake = Snake(weights, f"{prefix}.block.0", rate=rate)
        self.upsample = Upsample(weights, f"{prefix}.block.1", rate=rate, stride=stride)
        self.units = [
            ResidualUnit(weights, f"{prefix}.block.{index}", rate=rate * stride, dilation=dilation)
            for index, dilation in ((2, 1), (3, 3), (4, 9))
        ]
        self.lookback = self.upsample.lookback + sum(unit.lookback for unit in self.units)
        self.values = self.upsample.values + sum(unit.values for unit in self.units)

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, in] -> [batch, time * stride, out]."""
        x = self.upsample(self.snake(x), history)
        for unit in self.units:
            x = unit(x, history)
        return x


class ToMono(TensorHolder):
    """The last convolution, to one channel.

    Every row is projected onto the taps once, and the projections are summed along the diagonals:
    far less to read than windows of all channels.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int) -> None:
        weight, self.bias = weights[f"{prefix}.conv.weight"], weights[f"{prefix}.conv.bias"]
        self.product = Linear(weight[0].t().contiguous())  # [taps, in]
        self.taps = weight.shape[2]
        self.lookback = (self.taps - 1) / rate
        self.values = (self.taps - 1) * weight.shape[1]

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, in] -> [batch, time]."""
        x = history.extend(x, self.taps - 1)
        batch, time, _ = x.shape
        projected = self.product(x.flatten(0, 1)).view(batch, time, self.taps)
        count = time - self.taps + 1
        diagonals = projected.as_strided((batch, count, self.taps), (time * self.taps, self.taps, self.taps + 1))
        return diagonals.sum(2) + self.bias


def receptive_frames(lookbacks: list[float]) -> int:
    """How many frames back a chain of convolutions sees, rounded up with a frame to spare for partial frames."""
    return math.ceil(sum(lookbacks)) + 1
