"""A convolution over time that multiplies in bfloat16, with float32 in and out: for a CPU with such instructions.

Owns the layout of its weight. convolution.py has the pieces of the codec around it.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.tensor_holder import TensorHolder

_FRAMES: Final = 8
"""Frames that oneDNN chooses the layout of a weight for. Seldom are more decoded at once."""

_FEWEST_ROWS: Final = 128
"""With fewer output rows oneDNN has other kernels: other bits, and 200 times as slow with a layout for more rows."""


class Bfloat16Conv(TensorHolder):
    """y = x * W + b. An output row depends on its input row and the ones before it; sums are float32."""

    def __init__(self, weight: Tensor, bias: Tensor, *, rate: int, dilation: int = 1) -> None:
        """`weight`: [out, in, taps], the oldest row first. `bias`: [out]. `rate`: rows a frame."""
        self.past_rows = (weight.shape[2] - 1) * dilation
        self._dilation = (1, dilation)
        self._bias = bias.bfloat16()
        by_channel = weight.bfloat16()[:, :, None].contiguous(memory_format=torch.channels_last)
        self._fewest_rows = _FEWEST_ROWS if rate * _FRAMES >= _FEWEST_ROWS else 1
        size = [1, weight.shape[1], 1, self.past_rows + rate * _FRAMES]
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(  # noqa: SLF001 -- no public way to keep one packed
            by_channel, (0, 0), (1, 1), self._dilation, 1, size
        )

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [batch, past_rows + time, in] -> [batch, time, out]."""
        time = x.shape[1] - self.past_rows
        x = x.bfloat16()
        if time < self._fewest_rows:
            x = functional.pad(x, (0, 0, 0, self._fewest_rows - time))
        y = torch.ops.mkldnn._convolution_pointwise(  # noqa: SLF001 -- as above
            x.transpose(1, 2)[:, :, None], self._weight, self._bias, (0, 0), (1, 1), self._dilation, 1, "none", [], ""
        )
        return y[:, :, 0].transpose(1, 2)[:, :time].float()
