"""Which faults end the process."""

import pytest
import torch

from gpu_worker.faults import is_broken_device


class AcceleratorError(RuntimeError):
    """What torch raises for a CUDA error, by its name alone."""


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("whatever it says"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("device-side assert triggered"),
        RuntimeError("cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDNN_STATUS_INTERNAL_ERROR"),
    ],
)
def test_sticky(error: Exception) -> None:
    """After these every further call on the device fails."""
    assert is_broken_device(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. CUDA error: out of memory"),
        MemoryError(),
        ValueError("CUDA error in the text of somebody else"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("voice"),
    ],
)
def test_not_sticky(error: Exception) -> None:
    """These cost a request, or an engine, but not the process; memory that ran out least of all."""
    assert not is_broken_device(error)
