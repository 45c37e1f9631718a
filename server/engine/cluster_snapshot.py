"""One Snapshot of the snapshots of all GPU workers of a cluster.

Counts and bytes are sums. A model is in the state in which it answers soonest.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from shared.protocol import ModelStatus, PublicState, SavedVoice, Snapshot

_SOONEST: Final[tuple[PublicState, ...]] = ("resident", "loading", "offloaded", "absent", "unavailable")
_SUMMED: Final = ("running", "queued", "slots", "buffered", "stalled", "waiting_for_text", "restarts")
_SUMS: Final = ("audio_buffer", "requests", "host")

T = TypeVar("T", bound=msgspec.Struct)


def merge(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The snapshot of all workers together; `snapshots` has one at least."""
    if len(snapshots) == 1:
        return snapshots[0]
    first = snapshots[0]
    changes: dict[str, Any] = {name: sum(getattr(one, name) for one in snapshots) for name in _SUMMED}
    changes |= {name: _sum([getattr(one, name) for one in snapshots]) for name in _SUMS}
    return msgspec.structs.replace(
        first,
        **changes,
        accepting=any(one.accepting for one in snapshots),
        device=_sum([one.device for one in snapshots]),
        models=_models(snapshots),
        shared_bytes=_sum_of_counts(one.shared_bytes for one in snapshots),
        voices=_voices(snapshots),
        preloading=sorted({model for one in snapshots for model in one.preloading}),
        streams=[stream for one in snapshots for stream in one.streams],
        # Each web process tells every worker of its own.
        open_sockets=max(one.open_sockets for one in snapshots),
        caches=[cache for one in snapshots for cache in one.caches],
        emptied=_sum_of_counts(one.emptied for one in snapshots),
    )


def _sum(parts: Sequence[T]) -> T:
    """The first part with the sums of all numbers."""
    numbers = {
        name: sum(getattr(part, name) for part in parts)
        for name in parts[0].__struct_fields__
        if isinstance(getattr(parts[0], name), int | float)
    }
    return msgspec.structs.replace(parts[0], **numbers)


def _sum_of_counts(counts: Iterable[dict[Any, int]]) -> dict[Any, int]:
    total: dict[Any, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def _models(snapshots: Sequence[Snapshot]) -> list[ModelStatus]:
    by_id: dict[str, list[ModelStatus]] = {}
    for one in snapshots:
        for status in one.models:
            by_id.setdefault(status.id, []).append(status)
    return [_model(statuses) for statuses in by_id.values()]


def _model(statuses: list[ModelStatus]) -> ModelStatus:
    best = min(statuses, key=lambda status: _SOONEST.index(status.state))
    return msgspec.structs.replace(
        best,
        bytes=_sum_of_counts(status.bytes for status in statuses),
        host_bytes=sum(status.host_bytes for status in statuses),
        references=sum(status.references for status in statuses),
        pinned=any(status.pinned for status in statuses),
        last_used=max((status.last_used for status in statuses if status.last_used is not None), default=None),
        idle_s=min((status.idle_s for status in statuses if status.idle_s is not None), default=None),
    )


def _voices(snapshots: Sequence[Snapshot]) -> list[SavedVoice]:
    return list({voice.id: voice for one in snapshots for voice in one.voices}.values())
