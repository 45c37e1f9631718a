"""Which faults end the process."""

import sys

import pytest
import torch

from gpu_worker.engines.faults import BrokenDeviceError, is_broken_device, is_out_of_memory
from tests.gpu_worker.residency.fake_drivers import FakeTorch

SUFFIX = "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
"""The text that torch puts behind every CUDA error."""


class AcceleratorError(RuntimeError):
    """The exception that torch raises for an error of a CUDA call."""


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
    assert is_broken_device(BrokenDeviceError(words))


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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    ],
)
def test_out_of_memory(error: Exception) -> None:
    """Python's, torch's CPU allocator's, CUDA's and its libraries' ways to say that memory ran out are known."""
    assert is_out_of_memory(error)


def test_torch_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of torch's own types is known, whatever its text."""
    monkeypatch.setitem(sys.modules, "torch", FakeTorch())  # type: ignore[arg-type] -- stands in for the module
    assert is_out_of_memory(FakeTorch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa, opb)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx( handle, opa, opb)`"),
        ValueError("CUDA error: out of memory"),
    ],
)
def test_not_out_of_memory(error: Exception) -> None:
    """Other errors are none, nor are the same words of somebody else."""
    assert not is_out_of_memory(error)
