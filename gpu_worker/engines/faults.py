"""Errors of engines: which mean that memory ran out, and which mean a broken device. It does not import torch.

lifecycle/engine_steps.py frees memory for a running model, residency/manager.py for a load.
"""

import sys
from typing import Final

from gpu_worker.engines.base import JobError

_OUT_OF_MEMORY: Final = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUFFT_ALLOC_FAILED",
)
"""How torch's plain RuntimeErrors say it: the CPU's allocator, what CUDA itself allocates (pinned memory, graphs),
and the libraries that allocate beside torch. cuBLAS calls itself not initialized where its handle finds no room."""

_STICKY: Final = (
    "CUDA-capable device(s) is/are busy or unavailable",
    "an illegal instruction was encountered",
    "an illegal memory access was encountered",
    "context is destroyed",
    "device-side assert triggered",
    "hardware stack error",
    "invalid device context",
    "invalid program counter",
    "misaligned address",
    "operation not supported on global/shared address space",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error",
    "unknown error",
    "unspecified launch failure",
)
"""The texts of cudaGetErrorString for errors after which CUDA's documentation wants the process started again.

A library's status (cuBLAS, cuDNN) is none of them: it may mean a lack of memory, or shapes that have no kernel.
Where such a context was the reason, the very next call says one of these.
"""

_BROKEN: Final = tuple(f"{caller}: {words}" for caller in ("CUDA error", "CUDA driver error") for words in _STICKY)


class BrokenDeviceError(Exception):
    """The device's context in this process is lost; every further call on it fails. Only a new process helps."""


def is_broken_device(error: BaseException) -> bool:
    """True if a CUDA error has ended the context for good: after one, every further call fails with it.

    True for a BrokenDeviceError, too: a method further down has recognised such an error already.
    """
    if isinstance(error, BrokenDeviceError):
        return True
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return any(words in str(error) for words in _BROKEN)


def raise_if_broken(error: Exception) -> None:
    """Raise BrokenDeviceError if `error` means that the device is broken."""
    if is_broken_device(error):
        raise BrokenDeviceError(str(error)) from error


def failure_of_job(message: str, error: Exception) -> JobError:
    """What a request alone fails with, if handling its job raised `error`; `message` is for its client.

    Raises:
        BrokenDeviceError: `error` means that the device is broken.
    """
    raise_if_broken(error)
    if is_out_of_memory(error):
        return JobError("insufficient_vram", message, retry_after_s=5)
    return JobError("synthesis_failed", message)


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` says that memory ran out: Python's, CUDA's or the CPU allocator's of torch."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
