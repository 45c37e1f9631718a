"""Missing permissions on a file or folder, in words for messages: the path, the user, the reason."""

import errno
import os
import pwd
import stat
from pathlib import Path


def current_user() -> str:
    """The user of this process: "nobody (uid 65534)", or "uid 65534" if the user has no name."""
    uid = os.geteuid()
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def unreadable(path: Path, error: OSError) -> str:
    """The sentence for an `error` of the system while `path` was read."""
    return f"{path} cannot be read by {current_user()}: {error.strerror or error}"


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. OSError also for a pipe or a device: a service reads its files again, and must not wait."""
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode):
            return file.read()
        if os.path.samestat(status, os.stat(os.devnull)):  # noqa: PTH116 -- a name of the system, no path of ours
            return b""
    raise OSError(errno.EINVAL, "it is a pipe or a device, and must be a file")


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file that an operator has named. ValueError with a sentence if that is impossible."""
    try:
        data = read_bytes(path) if path.stat().st_size <= max_bytes else None
    except OSError as error:
        raise ValueError(unreadable(path, error)) from error
    if data is None:
        raise ValueError(f"{path} is larger than {max_bytes // 1_000_000} MB")
    return data


def folder_problem(path: Path) -> str | None:
    """Why files in the folder `path` cannot be read; None if they can, or if there is no such folder."""
    try:
        with os.scandir(path):
            pass
        if not os.access(path, os.X_OK):  # its files can be listed, but none can be opened
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return f"{path} is not a folder"
    except OSError as error:
        return unreadable(path, error)
    return None


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe even if it has no writer."""
    return os.open(path, flags | os.O_NONBLOCK)
