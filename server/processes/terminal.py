"""The meaning of SIGHUP: the terminal of the service was closed, or a reload is wanted."""

import os

_TERMINAL = "/dev/tty"


def has_terminal() -> bool:
    """True if this process has a controlling terminal. The kernel takes it away before it sends SIGHUP."""
    try:
        os.close(os.open(_TERMINAL, os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


_HAD_ONE = has_terminal()


def terminal_is_gone() -> bool:
    """True if this process has lost the terminal that it was started in."""
    return _HAD_ONE and not has_terminal()
