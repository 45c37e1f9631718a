"""The stacks of a process's threads, on stderr: at SIGUSR2, and when the process crashes."""

import faulthandler
import signal


def write_stacks_on_signals() -> None:
    """Register the handlers. Forked processes inherit them; SIGUSR2 needs no interpreter lock, so a hang has stacks."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
