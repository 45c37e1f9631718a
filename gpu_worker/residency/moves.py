"""What crosses the line between deciding about models, carrying it out, and telling how it went.

A Move is the loader's to carry out, one after the other; looks and fetches are the fetcher's, and run beside the moves.
"""

from typing import Literal

import msgspec

from gpu_worker.engines.base import Engine, JobError, Memory

TransitionKind = Literal["load", "restore", "offload", "drop"]
"""load: from disk to the device; restore: from host RAM to the device; offload: the way back; drop: give all up."""

Place = Literal["absent", "resident", "offloaded"]
"""Where a model is while nothing moves it."""

ARRIVES: dict[TransitionKind, Place] = {
    "load": "resident",
    "restore": "resident",
    "offload": "offloaded",
    "drop": "absent",
}
"""Where a move that works takes its model."""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One model is to change its place."""

    model: str
    kind: TransitionKind


class CheckFiles(msgspec.Struct, frozen=True):
    """A model's files are to be looked at."""

    model: str


class Download(msgspec.Struct, frozen=True):
    """A model's files are to be fetched."""

    model: str


class FilesChecked(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of a model's files.

    `problem` says why it cannot be loaded, or is empty; `remote`: it can, once its files have been fetched.
    `stamp` is another where the files have changed.
    """

    model: str
    problem: str
    remote: bool
    stamp: str


class Downloaded(msgspec.Struct, frozen=True, kw_only=True):
    """A fetch has ended: the model's files are here, or `error` says why they are not."""

    model: str
    error: JobError | None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A model is on its way; `detail` says how far, for people to read."""

    model: str
    detail: str


class TransitionDone(msgspec.Struct, frozen=True, kw_only=True):
    """A move worked.

    `engine` is the model's engine after a load or restore, else None.
    `memory` is what the model holds now.
    `before_bytes` and `after_bytes` are this process's part of the device, as the probe measured it around the move;
    `seconds` is how long the move took.
    """

    move: Transition
    engine: Engine | None
    memory: Memory
    before_bytes: int
    after_bytes: int
    seconds: float


class MoverFailed(msgspec.Struct, frozen=True):
    """The loader's thread has ended by a fault of the device or its own: no model can be moved any more."""

    reason: str


class TransitionFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A move did not work and holds nothing that was not held before it; `left` is where the model is now.

    The error's code is `insufficient_vram` or `model_unavailable`.
    """

    move: Transition
    error: JobError
    left: Place
