"""The C library's heap: its free memory goes back to the system only when asked, or at its upper end."""

import ctypes


def trim_heap() -> None:
    """Let the C library (glibc) return its free memory to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
