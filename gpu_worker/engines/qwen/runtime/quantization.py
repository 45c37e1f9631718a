"""TTS_QUANTIZATION on a device: the kernels that multiply, the refusals, and the bytes of a weight.

Owns what both devices share. products_trial.py chooses for a CPU, cuda_products.py for a GPU.
products.py packs the weights for a CPU, and kernels/quantized_linear.py quantises them for a GPU.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.kernels.selection import KernelSetting
from gpu_worker.engines.qwen.runtime import cuda_products, products_trial
from gpu_worker.engines.qwen.runtime.cuda_products import Capability
from gpu_worker.engines.qwen.runtime.products_trial import Products, Quantization, Shapes, are_large

_WIDTHS: Final[dict[Quantization, dict[str, int]]] = {
    "fp16": {"": 2},
    "int8": {"": 1},
    "fp8": {"": 2, "gate_proj": 1, "up_proj": 1},
}


def choose(
    quantization: Quantization,
    shapes: Shapes,
    device: str,
    dtype: torch.dtype,
    *,
    kernels: KernelSetting = "auto",
    kept_in: Path | None = None,
) -> Products:
    """The kernels for a model with products of these `shapes`. `kept_in`: the file of a CPU's trials.

    Raises:
        JobError: `model_unavailable` if this machine has none for `quantization`; the message says what to do.
    """
    if device == "cuda":
        return cuda_products.choose(quantization, dtype, kernels)
    if problem := unsupported(quantization, device, dtype):
        raise JobError("model_unavailable", problem)
    return products_trial.choose(quantization, shapes, dtype, kept_in)


def unsupported(
    quantization: Quantization,
    device: str,
    dtype: torch.dtype,
    *,
    kernels: KernelSetting = "auto",
    capability: Capability | None = None,
) -> str | None:
    """Why this device cannot use `quantization`, and what to do about it; None if it can.

    `capability`: that of the GPU, as far as it is known. CUDA is not started.
    """
    if device == "cuda":
        return cuda_products.unsupported(quantization, dtype, kernels, capability)
    if quantization == "fp8":
        return "TTS_QUANTIZATION=fp8 needs a GPU of compute capability 8.9; on a CPU set TTS_QUANTIZATION=int8"
    return products_trial.unsupported(quantization, dtype)


def widths(quantization: Quantization, device: str, shapes: Shapes) -> Mapping[str, int]:
    """Bytes of a value of a quantised matrix, by a part of its name; empty if nothing is quantised for sure."""
    if device == "cuda" and quantization == "int8":
        return _WIDTHS[quantization] | {"down_proj": 2, "head": 2}
    quantised = device == "cuda" or are_large(shapes)
    return _WIDTHS.get(quantization, {}) if quantised else {}
