"""The status of a model as clients and dashboards see it, from its ModelEntry."""

from typing import Final

from gpu_worker.residency.models import MOVING, ModelEntry, ModelState
from shared.protocol import ModelStatus, PublicState

_PUBLIC_STATES: Final[dict[ModelState, PublicState]] = {
    ModelState.ABSENT: "absent",
    ModelState.LOADING: "loading",
    ModelState.RESIDENT: "resident",
    ModelState.OFFLOADING: "offloaded",
    ModelState.OFFLOADED: "offloaded",
    ModelState.RESTORING: "loading",
    ModelState.DROPPING: "absent",
}


def status_of(entry: ModelEntry, now: float) -> ModelStatus:
    """The state of a model, and what it holds. `now` is in seconds of the clock of `ModelEntry.last_used`."""
    idle = entry.used_at is not None and not entry.references
    return ModelStatus(
        id=entry.id,
        state=_public_state(entry),
        detail=entry.progress or (entry.files.problem if entry.state is ModelState.ABSENT else "") or entry.last_error,
        bytes=entry.memory.device,
        host_bytes=entry.host_bytes,
        last_used=entry.used_at,
        idle_s=now - entry.last_used if idle else None,
        references=entry.references,
        pinned=entry.pinned,
        keep_alive_s=entry.keep_alive_s,
    )


def _public_state(entry: ModelEntry) -> PublicState:
    """The state as clients see it. A model that is leaving counts as gone already, so nothing starts on it."""
    state: PublicState = _PUBLIC_STATES[entry.state]
    if entry.state in MOVING:
        return state
    if entry.broken:
        return "loading" if entry.references else "absent"
    if entry.state is ModelState.ABSENT and entry.files.problem:
        return "unavailable"
    return "loading" if entry.wanted and entry.files.downloading else state
