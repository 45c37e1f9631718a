"""Computations that a device does not support, found before its first use: dtypes, attention and quantised weights.

Owns the sentences with which a start is refused. CUDA is not started: what it can is known by its compute capability.
"""

from collections.abc import Callable
from typing import Final

import msgspec
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.build import Device, DtypeName, codec_dtype, compute_dtype
from gpu_worker.engines.qwen.kernels.selection import KernelSetting
from gpu_worker.engines.qwen.model.attention import FLASH_CAPABILITY, Backend, attention
from gpu_worker.engines.qwen.runtime.cuda_products import Capability
from gpu_worker.engines.qwen.runtime.products_trial import Quantization
from gpu_worker.engines.qwen.runtime.quantization import unsupported

BFLOAT16_CAPABILITY: Final = (8, 0)
"""The first with products of bfloat16: Ampere."""


class Computation(msgspec.Struct, frozen=True, kw_only=True):
    """The settings by which engines are to compute. `capability`: that of the GPU, if it is known."""

    device: Device
    capability: Capability | None = None
    dtype: DtypeName = "auto"
    codec_dtype: DtypeName = "auto"
    attention_backend: Backend = "auto"
    kernels: KernelSetting = "auto"
    quantization: Quantization = "none"


def problems(wanted: Computation) -> list[str]:
    """A message for each part of `wanted` that this device cannot do, with the remedy."""
    found = [_message(check, wanted) for check in (_dtypes, _attention, _quantization)]
    return [problem for problem in dict.fromkeys(found) if problem is not None]


def dtype_on(device: Device, dtype: DtypeName, capability: Capability | None) -> DtypeName:
    """`dtype`; but "auto" becomes float16 on a GPU without products of bfloat16."""
    return "float16" if dtype == "auto" and _older(device, capability, BFLOAT16_CAPABILITY) else dtype


def _dtypes(wanted: Computation) -> str | None:
    compute_dtype(wanted.device, wanted.dtype)
    codec_dtype(wanted.device, wanted.dtype, wanted.codec_dtype)
    for name, value in (("TTS_DTYPE", wanted.dtype), ("TTS_CODEC_DTYPE", wanted.codec_dtype)):
        if value == "bfloat16" and _older(wanted.device, wanted.capability, BFLOAT16_CAPABILITY):
            return f"{name}=bfloat16 needs a GPU of compute capability 8.0 (Ampere); set auto, float16 or float32"
    return None


def _attention(wanted: Computation) -> str | None:
    if wanted.device == "cuda" and wanted.attention_backend == "auto":
        return None  # chosen by a trial, once the device is used
    attention(wanted.attention_backend, torch.device(wanted.device), _computed(wanted))
    if wanted.attention_backend == "flash_attention_2" and _older("cuda", wanted.capability, FLASH_CAPABILITY):
        return "TTS_ATTENTION_BACKEND=flash_attention_2 needs a GPU of compute capability 8.0 (Ampere); use sdpa"
    return None


def _quantization(wanted: Computation) -> str | None:
    return unsupported(
        wanted.quantization,
        wanted.device,
        _computed(wanted),
        kernels=wanted.kernels,
        capability=wanted.capability,
    )


def _computed(wanted: Computation) -> torch.dtype:
    return compute_dtype(wanted.device, dtype_on(wanted.device, wanted.dtype, wanted.capability))


def _older(device: Device, capability: Capability | None, first: Capability) -> bool:
    return device == "cuda" and capability is not None and capability < first


def _message(check: Callable[[Computation], str | None], wanted: Computation) -> str | None:
    try:
        return check(wanted)
    except JobError as error:
        return error.message
