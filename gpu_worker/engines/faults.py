"""Which faults end the process: told from the others without importing torch."""

from typing import Final

from gpu_worker.residency.memory import is_out_of_memory

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
"""What cudaGetErrorString says of the errors after which CUDA's documentation has the process ended and started again.

A library's status (cuBLAS, cuDNN) is none of them: it may mean a lack of memory, or shapes that have no kernel.
Where such a context was the reason, the very next call says one of these.
"""

_BROKEN: Final = tuple(f"{caller}: {words}" for caller in ("CUDA error", "CUDA driver error") for words in _STICKY)


class BrokenDeviceError(Exception):
    """The device's context in this process is lost; every further call on it fails. Only a new process helps."""


def is_broken_device(error: BaseException) -> bool:
    """Whether a CUDA error has ended the context for good: after one, every further call fails with it."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    return any(words in str(error) for words in _BROKEN)
