"""The products of a GPU with quantised weights: int8, or float8 for the matrices gate and up.

Each is a Kernel as products.py has them, and launches one kernel, as a plain product does. torch's own were left out:
`_weight_int8pack_mm` (2.13) gives each output to one thread, which reads its weights one by one, and computes with
float32 activations alone. torchao widens a matrix in memory before it multiplies: 5 bytes a weight instead of 1.
"""

import importlib.util
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.kernels.quantized_linear import quantize
from gpu_worker.engines.qwen.kernels.selection import KernelSetting, quantized_linear_on, quantized_linear_problem
from gpu_worker.engines.qwen.runtime.products_trial import PLAIN, Products, Quantization

Capability = tuple[int, int]
"""The compute capability of a GPU: (8, 6) is 8.6."""

FP8_CAPABILITY: Final = (8, 9)
"""The first with instructions for float8: Ada."""

KINDS: Final = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

PRODUCTS: Final = {
    "int8": Products(weights="int8_cuda", sensitive="plain"),
    "fp8": Products(gate_up="fp8_cuda"),
}
"""The kernels of each quantisation. float8 has 3 bits behind its first, so only the largest matrices have it."""


class _Quantized:
    """Weights of one byte with a scale for each output. A row's bits do not depend on the batch."""

    hidden_bytes = 0
    kind: str

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._scale = quantize(weight, KINDS[self.kind])
        self._bias = bias
        self._product = quantized_linear_on(weight.device)
        self.tensors = [self._weight, self._scale, *([] if bias is None else [bias])]

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._weight, self._scale, self._bias)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """It rounds the product and the sum, as the plain product of 16 bits does."""
        return y + self(x)


class CudaInt8(_Quantized):
    """127 is the largest weight of each output."""

    kind = "int8"


class CudaFp8(_Quantized):
    """float8 (e4m3): 448 is the largest weight of each output, and small ones keep their precision."""

    kind = "fp8"


CUDA_KERNELS: Final = {"int8_cuda": CudaInt8, "fp8_cuda": CudaFp8}


def choose(quantization: Quantization, dtype: torch.dtype, kernels: KernelSetting = "auto") -> Products:
    """The kernels of a model on CUDA. The first call for a quantisation compiles its kernel and compares it with torch.

    Raises:
        JobError: `model_unavailable` if this GPU has none for `quantization`; the message says what to do.
    """
    problem = unsupported(quantization, dtype, kernels)
    if problem is None and quantization in KINDS:
        reason = quantized_linear_problem(KINDS[quantization], torch.device("cuda"), dtype)
        problem = reason and f"TTS_QUANTIZATION={quantization} is impossible here, set TTS_QUANTIZATION=none: {reason}"
    if problem is not None:
        raise JobError("model_unavailable", problem)
    return PRODUCTS.get(quantization, PLAIN)


def unsupported(
    quantization: Quantization, dtype: torch.dtype, kernels: KernelSetting, capability: Capability | None = None
) -> str | None:
    """Why a GPU cannot use `quantization`, and what to do about it; None if it can, as far as is known without it.

    `capability`: None where it is not known.
    """
    if quantization in ("auto", "none"):
        return None
    none = "set TTS_QUANTIZATION=none"
    needs = f"needs a GPU of compute capability 8.9 (Ada, Hopper, Blackwell), not {_name(capability)}"
    reasons = (
        (quantization == "fp16", f"is for a CPU; on a GPU weights have 16 bits anyway: {none} or int8"),
        (dtype == torch.float32, f"computes in 16 bits on a GPU; leave TTS_DTYPE at auto, or {none}"),
        (kernels == "torch", f"needs a Triton kernel on a GPU; set TTS_KERNELS=auto, or {none}"),
        (not _has_triton(), f"needs the package triton on a GPU, which is not installed; install it, or {none}"),
        (quantization == "fp8" and _is_older(capability), f"{needs}; set TTS_QUANTIZATION=int8"),
    )
    return next((f"TTS_QUANTIZATION={quantization} {reason}" for holds, reason in reasons if holds), None)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_older(capability: Capability | None) -> bool:
    return capability is not None and capability < FP8_CAPABILITY


def _name(capability: Capability | None) -> str:
    return ".".join(map(str, capability or ()))
