"""The state of each model, and the orders and reports that policy, mover and checkpoint threads exchange.

Plain data: `ModelEntry` is written by `manager.Residency` alone, read by `policy`; everything else is immutable.
A `Transition` is carried out by the mover, one after the other.
File checks and downloads are carried out by the checkpoint threads, beside the transitions.
"""

import enum
from typing import Final, Literal

import msgspec

from gpu_worker.engines.base import Engine, JobError, Memory


class ModelState(enum.Enum):
    """The place of a model's weights, or the move that they are in. At most one model is in a state that ends in ING.

    ABSENT -> LOADING -> RESIDENT -> OFFLOADING -> OFFLOADED -> RESTORING -> RESIDENT; DROPPING -> ABSENT from anywhere.
    RESIDENT: on the device, ready to speak. OFFLOADED: weights in host RAM, the device's memory given back.
    """

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    OFFLOADING = "offloading"
    OFFLOADED = "offloaded"
    RESTORING = "restoring"
    DROPPING = "dropping"


TransitionKind = Literal["load", "restore", "offload", "drop"]
"""load: disk to device; restore: host RAM to device; offload: device to host RAM; drop: free the model everywhere."""

STATE_DURING: Final[dict[TransitionKind, ModelState]] = {
    "load": ModelState.LOADING,
    "restore": ModelState.RESTORING,
    "offload": ModelState.OFFLOADING,
    "drop": ModelState.DROPPING,
}

TARGET_STATE: Final[dict[TransitionKind, ModelState]] = {
    "load": ModelState.RESIDENT,
    "restore": ModelState.RESIDENT,
    "offload": ModelState.OFFLOADED,
    "drop": ModelState.ABSENT,
}
"""The state after a transition that works."""

ARRIVING: Final = frozenset({ModelState.LOADING, ModelState.RESTORING})
MOVING: Final = frozenset(STATE_DURING.values())


class Transition(msgspec.Struct, frozen=True):
    """One model changes its state."""

    model: str
    kind: TransitionKind


class FilesStatus(msgspec.Struct, kw_only=True):
    """The result of the last check of a model's files, and the file work in flight.

    `current`: no load has invalidated that check since. `checking`, `downloading`: a check or download is in flight.
    `problem`: why the model cannot be loaded; empty if it can. `remote`: a load needs a download first.
    `stamp` changes when the files change; None before the first check.
    """

    current: bool = False
    checking: bool = False
    downloading: bool = False
    problem: str = ""
    remote: bool = False
    stamp: str | None = None

    @property
    def blocks_load(self) -> bool:
        """True if a load has to wait for a check or a download."""
        return not self.current or self.downloading or (self.remote and not self.problem)


class ModelEntry(msgspec.Struct, kw_only=True):
    """One model. Times are the monotonic clock's seconds; `used_at` is Unix seconds. Bytes are measured, not computed.

    `estimated_bytes`: what a load is expected to take; `measured_bytes`: what the model last held on the device;
    `measured_host_bytes`: what it last held in host RAM.
    `references`: requests queued or running. `requested`: what an admin asked for and has not got yet.
    `queue_number`: the place in the load queue; lower loads first.
    `short_since`: when the load at the head of its wait first found no room.
    `retried`: the transition to the device ran out of memory once since the model was enqueued.
    `preload`: one of the models of the start; `preload_pending`: the start still waits for it.
    `evict`: marked for eviction. `broken`: the engine failed and has to be replaced.
    `progress`: how far a load or download has come. `last_error`: why the model could not come the last time;
    `shortage_checked_at`: when it was last checked whether that lack of room has passed, None for other errors.
    """

    id: str
    estimated_bytes: int
    state: ModelState = ModelState.ABSENT
    memory: Memory = Memory()
    measured_bytes: int | None = None
    measured_host_bytes: int | None = None
    files: FilesStatus = msgspec.field(default_factory=FilesStatus)
    references: int = 0
    requested: Literal["load", "unload"] | None = None
    queue_number: int = 0
    short_since: float | None = None
    retried: bool = False
    preload: bool = False
    preload_pending: bool = False
    pinned: bool = False
    evict: bool = False
    broken: bool = False
    keep_alive_s: float | None = None
    last_used: float = 0.0
    used_at: float | None = None
    offloaded_since: float = 0.0
    progress: str = ""
    last_error: str = ""
    shortage_checked_at: float | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes held on the device."""
        return sum(self.memory.device.values())

    @property
    def host_bytes(self) -> int:
        """Bytes held in host RAM."""
        return sum(self.memory.host.values())

    @property
    def load_bytes(self) -> int:
        """Bytes that a fresh load will take.

        A fresh load makes as many slots as fit, so a size that the model had grown to must not forbid one.
        """
        if self.measured_bytes is None:
            return self.estimated_bytes
        return min(self.measured_bytes, self.estimated_bytes)

    @property
    def arrival_bytes(self) -> int:
        """Bytes that the model will hold on the device; a restore brings back exactly what was measured."""
        if self.state is ModelState.OFFLOADED and self.measured_bytes is not None:
            return self.measured_bytes
        return self.load_bytes

    @property
    def offload_bytes(self) -> int:
        """Bytes of host RAM that the model will hold once offloaded; before the first offload, its device bytes."""
        return self.device_bytes if self.measured_host_bytes is None else self.measured_host_bytes

    @property
    def wanted(self) -> bool:
        """True if a request or an admin waits for the model to become resident."""
        return self.state is not ModelState.RESIDENT and (self.references > 0 or self.requested == "load")

    @property
    def evictable(self) -> bool:
        """True if the model may be taken away for the sake of others."""
        return self.references == 0 and not self.pinned and self.requested != "load"

    @property
    def only_for_start(self) -> bool:
        """True if only the start waits for the model."""
        return self.preload_pending and self.references == 0


class Refusal(msgspec.Struct, frozen=True):
    """A wanted model cannot become resident now: its requests and admin calls fail with this.

    `code`: `insufficient_vram` (the message holds the arithmetic) or `model_unavailable`.
    """

    model: str
    code: Literal["insufficient_vram", "model_unavailable"]
    message: str
    retry_after_s: float


# --- from the threads, to the synthesis loop's inbox ---------------------------------------------------------------


class CheckFiles(msgspec.Struct, frozen=True):
    """Check a model's files."""

    model: str


class Download(msgspec.Struct, frozen=True):
    """Download a model's files."""

    model: str


class FilesChecked(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a check; the fields are those of FilesStatus."""

    model: str
    problem: str
    remote: bool
    stamp: str


class Downloaded(msgspec.Struct, frozen=True, kw_only=True):
    """A download has ended: the files are here, or `error` says why not."""

    model: str
    error: JobError | None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a load or download has come, in words for people."""

    model: str
    detail: str


class TransitionDone(msgspec.Struct, frozen=True, kw_only=True):
    """A transition worked.

    `engine`: the model's engine after a load or restore, else None. `memory`: what the model holds now.
    `before_bytes`, `after_bytes`: this process's part of the device, measured around the transition.
    """

    transition: Transition
    engine: Engine | None
    memory: Memory
    before_bytes: int
    after_bytes: int
    seconds: float


class TransitionFailed(msgspec.Struct, frozen=True, kw_only=True):
    """A transition did not work and holds nothing that was not held before.

    `state`: ABSENT or OFFLOADED, where the model is now. The error's code: `insufficient_vram` or `model_unavailable`.
    """

    transition: Transition
    error: JobError
    state: ModelState


class MoverFailed(msgspec.Struct, frozen=True):
    """The mover thread has ended by a fault of the device or its own: no model can be moved any more."""

    reason: str


Report = TransitionDone | TransitionFailed | FilesChecked | Downloaded | Progress
"""The reports of the threads, for `Residency.handle`."""
