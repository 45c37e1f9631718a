"""What this process may not do with a file or folder, in words for messages: the path, the user, the reason."""

import errno
import os
import pwd
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


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file that an operator has named. ValueError with a sentence if that is impossible."""
    try:
        data = path.read_bytes() if path.stat().st_size <= max_bytes else None
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
