"""Which faults end the process: told from the others without importing torch."""

from typing import Final

from gpu_worker.memory import is_out_of_memory

_STICKY: Final = ("CUDA error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS")


class BrokenDeviceError(Exception):
    """The device's context in this process is lost; every further call on it fails. Only a new process helps."""


def is_broken_device(error: BaseException) -> bool:
    """Whether a CUDA error has ended the context for good: after one, every further call fails with it."""
    if is_out_of_memory(error):
        return False
    if any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _STICKY)
