"""Which faults end the process."""

import pytest
import torch

from gpu_worker.engines.faults import is_broken_device

SUFFIX = "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
"""What torch puts behind every CUDA error."""


class AcceleratorError(RuntimeError):
    """What torch raises for an error of a CUDA call."""


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: an illegal instruction was encountered",
        "CUDA error: misaligned address",
        "CUDA error: operation not supported on global/shared address space",
        "CUDA error: invalid program counter",
        "CUDA error: unspecified launch failure",
        "CUDA error: the launch timed out and was terminated",
        "CUDA error: device-side assert triggered",
        "CUDA error: hardware stack error",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: invalid device context",
        "CUDA error: context is destroyed",
        "CUDA error: unknown error",
        "CUDA driver error: an illegal memory access was encountered",
    ],
)
def test_sticky(words: str) -> None:
    """After these every further call on the device fails."""
    assert is_broken_device(AcceleratorError(words + SUFFIX))
    assert is_broken_device(RuntimeError(words))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. CUDA error: out of memory"),
        MemoryError(),
        AcceleratorError("CUDA error: out of memory" + SUFFIX),
        AcceleratorError("CUDA error: invalid argument" + SUFFIX),
        AcceleratorError("CUDA error: operation not permitted when stream is capturing" + SUFFIX),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx( handle, opa, opb)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        ValueError("CUDA error: unspecified launch failure, in the text of somebody else"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("voice"),
    ],
)
def test_not_sticky(error: Exception) -> None:
    """These cost a request, or an engine, but not the process; memory that ran out least of all."""
    assert not is_broken_device(error)
