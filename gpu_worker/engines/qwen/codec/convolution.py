"""The convolutional pieces of the codec decoder. Each is causal, and continues from chunk to chunk.

All tensors are [batch, time, channels]. A convolution is then a matrix product over windows of rows,
and a transposed convolution is a product whose output rows are `stride` samples long.
A piece reads its inputs of the previous chunk from `History`, and keeps nothing itself.
In every piece, `rate` is the number of input rows a frame, `lookback_frames` how far back in frames the piece reads,
and `history_size` how many values of `History` the piece uses.
"""

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.codec.bfloat16_conv import Bfloat16Conv
from gpu_worker.engines.qwen.kernels.bias_snake import Snake
from gpu_worker.engines.qwen.kernels.causal_input import causal_input
from gpu_worker.engines.qwen.kernels.selection import Kernels
from gpu_worker.engines.qwen.model.layers import Linear, aligned
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products
from gpu_worker.engines.qwen.tensor_holder import TensorHolder

UNFOLD_UP_TO_RATE: Final = {"cpu": 160, "cuda": 32}
"""A convolution with at most this rate is one matrix product over copied windows. Others use a direct kernel.

CPU: measured on one core of an AMD EPYC (Zen 4), float32, published sizes. At rates of 4 to 32 the product over packed
weights takes half the time of the direct kernel, at 160 both are equal, above 160 copying costs more than it saves.
CUDA: derived, not measured. Windows at a rate of 160 would take 440 MB for 64 streams of 8 frames in bfloat16.
"""


class History:
    """The last inputs of the causal convolutions, read and replaced in order of execution."""

    def __init__(self, old: Tensor, new: Tensor, kernels: Kernels) -> None:
        """`old` [batch, history_size of all pieces]: of the previous chunk. `new`, shaped alike: becomes this one's.

        They may be one tensor for kernels that work in place, see CausalInput.
        """
        self._old, self._new = old, new
        self._kernels = kernels
        self._offset = 0

    def extend(
        self, x: Tensor, rows: int, *, added: Tensor | None = None, snake: Snake | None = None
    ) -> tuple[Tensor, Tensor]:
        """[batch, time, channels] -> [batch, rows + time, channels]: the last rows of the previous chunk come first.

        It returns x plus `added`, and what the convolution reads: behind the old rows, `snake` of that sum.
        `added` may be overwritten.
        """
        size = rows * x.shape[2]
        part = slice(self._offset, self._offset + size)
        self._offset += size
        old = self._old[:, part].unflatten(1, (rows, x.shape[2]))
        new = old if self._new is self._old else self._new[:, part].unflatten(1, (rows, x.shape[2]))
        return self._kernels.causal_input(x, added, snake, old, new)


def windows(x: Tensor, taps: int, dilation: int) -> Tensor:
    """Sliding windows over time, without copying: [batch, time, channels] -> [batch, windows, taps, channels].

    X must be contiguous; results of History.extend are.
    """
    batch, time, channels = x.shape
    count = time - (taps - 1) * dilation
    return x.as_strided((batch, count, taps, channels), (time * channels, channels, dilation * channels, 1))


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Weight [out, in] times the scale [out] of each output, rounded once."""
    return (scale.float()[:, None] * weight.float()).to(weight.dtype)


def multiplies_in_bfloat16(weight: Tensor, bias: Tensor) -> bool:
    """Whether the weight alone was rounded to bfloat16: that of a quantized codec."""
    return weight.dtype is torch.bfloat16 and bias.dtype is torch.float32


class CausalConv(TensorHolder):
    """A convolution over time. An output row depends on its input row and the `past_rows` before it.

    `left_bias`: the bias that is not in the output yet, or None.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        prefix: str,
        *,
        rate: int,
        dilation: int = 1,
        leave_bias: bool = False,
        products: Products = PLAIN,
    ) -> None:
        """`leave_bias`: leave the bias to the caller wherever it would be a kernel of its own."""
        weight, bias = weights[f"{prefix}.conv.weight"], weights[f"{prefix}.conv.bias"]
        self.taps = weight.shape[2]
        self.dilation = dilation
        self.past_rows = (self.taps - 1) * dilation
        self.lookback_frames = self.past_rows / rate
        self.history_size = self.past_rows * weight.shape[1]
        self.kernel: Bfloat16Conv | Linear | Tensor
        if multiplies_in_bfloat16(weight, bias):
            self.left_bias: Tensor | None = None
            self.bias: Tensor | None = bias
            self.kernel = Bfloat16Conv(weight, bias, rate=rate, dilation=dilation)
            return
        by_tap = weight.transpose(1, 2).contiguous()  # [out, taps, in]
        on_cuda = weight.device.type == "cuda"
        product = rate <= UNFOLD_UP_TO_RATE[weight.device.type] or (on_cuda and self.taps == 1)
        self.left_bias = bias if leave_bias and on_cuda and not product else None
        self.bias = bias if self.left_bias is None else None
        if product:
            self.kernel = Linear(by_tap.flatten(1), bias, products)
        else:  # [out, in, 1, taps] with channels innermost, for a two-dimensional convolution of height 1
            self.kernel = by_tap.transpose(1, 2)[:, :, None]

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, in] -> [batch, time, out]."""
        if self.past_rows:
            _, x = history.extend(x, self.past_rows)
        return self.of_extended(x)

    def of_extended(self, x: Tensor) -> Tensor:
        """[batch, past_rows + time, in] -> [batch, time, out]."""
        if isinstance(self.kernel, Bfloat16Conv):
            return self.kernel(x)
        if isinstance(self.kernel, Linear):
            if self.past_rows:
                x = windows(x, self.taps, self.dilation).flatten(2)
            return self.kernel.batch_invariant(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self._convolve(x.transpose(1, 2)[:, :, None], self.kernel)[:, :, 0].transpose(1, 2)

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available():
            # For one stream torch would choose a slower kernel than that of oneDNN: 98 instead of 45 µs a call.
            return torch.mkldnn_convolution(x, kernel, self.bias, (0, 0), (1, 1), (1, self.dilation), 1)
        return functional.conv2d(x, kernel, self.bias, dilation=(1, self.dilation))


class Upsample(TensorHolder):
    """A transposed convolution over time, cut on the right as in the official package.

    An input row and the `taps - 1` rows before it make `stride` output rows:
    a plain matrix product that adds the bias once.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], prefix: str, *, rate: int, stride: int, products: Products = PLAIN
    ) -> None:
        weight, bias = weights[f"{prefix}.conv.weight"], weights[f"{prefix}.conv.bias"]
        channels_in, self.channels, kernel = weight.shape
        self.stride = stride
        self.taps = kernel // stride
        self.past_rows = self.taps - 1
        self.lookback_frames = self.past_rows / rate
        self.history_size = self.past_rows * channels_in
        # [in, out, tap, phase] -> [phase, out, tap, in]. Tap 0 is the newest row; windows begin with the oldest.
        matrix = weight.unflatten(2, (self.taps, stride)).permute(3, 1, 2, 0).flip(2)
        matrix = matrix.reshape(stride * self.channels, self.taps, channels_in)
        self.product: Bfloat16Conv | Linear
        if multiplies_in_bfloat16(weight, bias):
            self.product = Bfloat16Conv(matrix.transpose(1, 2), bias.repeat(stride), rate=rate)
        else:
            self.product = Linear(matrix.flatten(1), bias.repeat(stride), products)

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, in] -> [batch, time * stride, out]."""
        if self.past_rows:
            _, x = history.extend(x, self.past_rows)
        return self.of_extended(x)

    def of_extended(self, x: Tensor) -> Tensor:
        """[batch, past_rows + time, in] -> [batch, time * stride, out]."""
        batch, rows, channels_in = x.shape
        time = rows - self.past_rows
        if isinstance(self.product, Bfloat16Conv):
            return self.product(x).view(batch, time * self.stride, self.channels)
        if self.past_rows:
            x = windows(x, self.taps, 1)
        y = self.product.batch_invariant(x.reshape(batch * time, self.taps * channels_in))
        return y.view(batch, time * self.stride, self.channels)


class ConvNeXt(TensorHolder):
    """A depthwise convolution of 7 rows, then a two-layer perceptron on each row, added to the input."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int, products: Products = PLAIN) -> None:
        def pair(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"]

        depthwise, self.depthwise_bias = pair("dwconv.conv")  # [channels, 1, taps]
        self.depthwise = depthwise[:, 0].t().contiguous()
        self.norm_weight, self.norm_bias = pair("norm")
        self.past_rows = self.depthwise.shape[0] - 1
        self.lookback_frames = self.past_rows / rate
        self.history_size = depthwise.numel() // depthwise.shape[2] * self.past_rows
        self.expand = Linear(*pair("pwconv1"), products)
        weight, bias = pair("pwconv2")
        gamma = weights[f"{prefix}.gamma"]
        self.project = Linear(scaled(weight, gamma), gamma * bias, products)

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, channels] -> the same."""
        _, extended = history.extend(x, self.past_rows)
        y = (windows(extended, self.past_rows + 1, 1) * self.depthwise).sum(2) + self.depthwise_bias
        y = functional.layer_norm(y, y.shape[2:], self.norm_weight, self.norm_bias, 1e-6)
        y = self.project.batch_invariant(functional.gelu(self.expand.batch_invariant(y.flatten(0, 1))))
        return y.view_as(x) + x


class ResidualUnit(TensorHolder):
    """Snake, dilated convolution of 7 rows, Snake, convolution of 1 row, added to the input."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        prefix: str,
        *,
        rate: int,
        dilation: int,
        kernels: Kernels,
        products: Products = PLAIN,
    ) -> None:
        self.kernels = kernels
        self.snake1 = Snake(weights, f"{prefix}.act1", rate=rate)
        self.dilated = CausalConv(
            weights, f"{prefix}.conv1", rate=rate, dilation=dilation, leave_bias=True, products=products
        )
        self.snake2 = Snake(weights, f"{prefix}.act2", rate=rate)
        self.pointwise = CausalConv(weights, f"{prefix}.conv2", rate=rate, products=products)
        self.lookback_frames = self.dilated.lookback_frames
        self.history_size = self.dilated.history_size

    def __call__(self, x: Tensor, added: Tensor | None, history: History) -> tuple[Tensor, Tensor | None]:
        """`x` and what is still to be added to it, [batch, time, channels] each -> the same of the output."""
        x, y = history.extend(x, self.dilated.past_rows, added=added, snake=self.snake1)
        y = self.dilated.of_extended(y)
        y = self.kernels.bias_snake(y, self.dilated.left_bias, self.snake2)
        y = self.pointwise(y, history)
        # torch adds best while the caches hold both; the kernel of the next input adds on its way.
        return (y.add_(x), None) if self.kernels.causal_input is causal_input else (x, y)


class UpsamplingBlock(TensorHolder):
    """Snake, a transposed convolution, and three residual units of growing dilation."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        prefix: str,
        *,
        rate: int,
        stride: int,
        kernels: Kernels,
        products: Products = PLAIN,
    ) -> None:
        self.snake = Snake(weights, f"{prefix}.block.0", rate=rate)
        self.upsample = Upsample(weights, f"{prefix}.block.1", rate=rate, stride=stride, products=products)
        self.units = [
            ResidualUnit(
                weights,
                f"{prefix}.block.{index}",
                rate=rate * stride,
                dilation=dilation,
                kernels=kernels,
                products=products,
            )
            for index, dilation in ((2, 1), (3, 3), (4, 9))
        ]
        self.lookback_frames = self.upsample.lookback_frames + sum(unit.lookback_frames for unit in self.units)
        self.history_size = self.upsample.history_size + sum(unit.history_size for unit in self.units)

    def __call__(self, x: Tensor, added: Tensor | None, history: History) -> tuple[Tensor, Tensor | None]:
        """`x` and what is still to be added to it, [batch, time, in] each -> the same of the output.

        The kernel that makes the next convolution's input adds them, so no kernel reads them for the sum alone.
        """
        _, extended = history.extend(x, self.upsample.past_rows, added=added, snake=self.snake)
        x, added = self.upsample.of_extended(extended), None
        for unit in self.units:
            x, added = unit(x, added, history)
        return x, added


class ToMono(TensorHolder):
    """The last convolution, to one channel.

    Each row is projected onto all taps once, and the projections are summed along the diagonals.
    That reads far less memory than windows of all channels.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int) -> None:
        weight, self.bias = weights[f"{prefix}.conv.weight"], weights[f"{prefix}.conv.bias"]
        matrix = aligned(weight[0].t().contiguous())  # [taps and padding, in]
        self.product = Linear(matrix)
        self._width = matrix.shape[0]
        self.taps = weight.shape[2]
        self.past_rows = self.taps - 1
        self.lookback_frames = self.past_rows / rate
        self.history_size = self.past_rows * weight.shape[1]

    def __call__(self, x: Tensor, history: History) -> Tensor:
        """[batch, time, in] -> [batch, time]."""
        return self.of_extended(history.extend(x, self.past_rows)[1])

    def of_extended(self, x: Tensor) -> Tensor:
        """[batch, past_rows + time, in] -> [batch, time]."""
        batch, rows, _ = x.shape
        projected, width = self.product(x.flatten(0, 1)), self._width
        count = rows - self.past_rows
        diagonals = projected.as_strided((batch, count, self.taps), (rows * width, width, width + 1))
        return diagonals.sum(2) + self.bias


def receptive_frames(lookbacks: list[float]) -> int:
    """How many frames back a chain of convolutions reads, rounded up, plus one because frames may be partial."""
    return math.ceil(sum(lookbacks)) + 1
