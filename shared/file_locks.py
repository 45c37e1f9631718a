"""The lock of a file among processes and threads. The kernel releases it when the file is closed or a process dies."""

import errno
import fcntl
from typing import IO, Any, Final

import structlog

_NO_LOCKS: Final = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""The errors of flock on a file system without locks."""

log = structlog.get_logger(__name__)


def lock(file: IO[Any], *, wait: bool = True) -> None:
    """Hold the lock of `file` until it is closed. A file system without locks gets a warning, and none.

    Raises BlockingIOError without `wait` if another one holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("file_system_without_locks", file=str(file.name), reason=str(error))
