"""The JSON files of a checkpoint, and the error that names an unusable file of any kind.

This module knows no particular file.
"""

from pathlib import Path
from typing import TypeVar

import msgspec

from gpu_worker.engines.base import JobError
from shared.access import unreadable

_T = TypeVar("_T")


def unavailable(path: Path, problem: str) -> JobError:
    """The error `model_unavailable` for a file that keeps a model from being loaded."""
    return JobError("model_unavailable", f"{path}: {problem}")


class _Typed(msgspec.Struct, frozen=True):
    model_type: str


def require_model_type(path: Path, model_type: str) -> None:
    """Check the `model_type` of a config.json. Raises as `read_json` does."""
    found = read_json(path, _Typed).model_type
    if found != model_type:
        raise unavailable(path, f"describes a {found!r} model, not {model_type!r}")


def read_json(path: Path, kind: type[_T]) -> _T:
    """The contents of a JSON file, checked against a msgspec type.

    Raises:
        JobError: `model_unavailable`: the file is missing, cannot be read, or does not match `kind`.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError as error:
        raise unavailable(path, "missing") from error
    except OSError as error:
        raise JobError("model_unavailable", unreadable(path, error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unavailable(path, f"is damaged: {error}") from error
