"""The cleanup pass: which models have outlived their time on the device or in host RAM, one after the other.

It runs now and then, or when it is asked for, and decides nothing about models that are to come (see arrivals.py).
Owned by the synthesis thread alone; its time is clocks that are passed in.
"""

from collections.abc import Callable

import msgspec

from gpu_worker.residency.ledger import ModelEntry, ModelTable
from gpu_worker.residency.memory import MemoryProbe
from gpu_worker.residency.moves import Transition
from gpu_worker.residency.room import Room
from shared.protocol import CleanupPass


class CleanupOptions(msgspec.Struct, frozen=True, kw_only=True):
    """When models that nobody uses leave; the byte budgets are the probe's to know.

    Idle for `idle_timeout_s`, a model leaves the device for host RAM; there for `host_idle_timeout_s`, it leaves that.
    Both are checked every `cleanup_interval_s`, unless not `cleanup_enabled`.
    """

    idle_timeout_s: float = 300.0
    host_idle_timeout_s: float = 3600.0
    cleanup_interval_s: float = 30.0
    cleanup_enabled: bool = True


class _Pass:
    """A cleanup pass under way: what is still to look at, and what was unloaded, of that `dropped` from host RAM too.

    `by_hand`: somebody asked for it.
    """

    def __init__(self, timestamp: float, before_bytes: int, checked: list[str], *, by_hand: bool) -> None:
        self.timestamp = timestamp
        self.before_bytes = before_bytes
        self.checked = checked
        self.by_hand = by_hand
        self.rest = list(checked)
        self.unloaded: list[str] = []
        self.dropped: list[str] = []


class Cleanup:
    """The passes over the models of `ledger`. `clock` gives monotonic seconds, `wall` Unix seconds.

    `last` is the result of the pass that ended last.
    """

    def __init__(
        self,
        ledger: ModelTable,
        room: Room,
        options: CleanupOptions,
        *,
        probe: MemoryProbe,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._room = room
        self._options = options
        self._probe = probe
        self._clock = clock
        self._wall = wall
        self._asked = False
        self._pass: _Pass | None = None
        self._next_pass = clock() + options.cleanup_interval_s
        self.last: CleanupPass | None = None

    def start(self) -> None:
        """Run a pass now, whether or not they run on their own; `last` is its result once it is not `under_way`."""
        self._asked = self._asked or self._pass is None

    @property
    def under_way(self) -> bool:
        """Whether a pass is asked for or has begun."""
        return self._asked or self._pass is not None

    def next_move(self) -> Transition | None:
        """The next move of the pass; a pass with none left ends. To be asked for while no move is in flight."""
        now = self._clock()
        due = self._options.cleanup_enabled and now >= self._next_pass
        if self._pass is None and (due or self._asked):
            checked = [account.id for account in self._ledger if account.place != "absent"]
            before_bytes = self._probe.device().ours_bytes
            self._pass = _Pass(self._wall(), before_bytes, checked, by_hand=self._asked)
            self._asked = False
            self._next_pass = now + self._options.cleanup_interval_s
        current = self._pass
        if current is None:
            return None
        while current.rest:
            account = self._ledger[current.rest[0]]
            move = self._outlived(account, now)
            if move is None or move.model == account.id:
                current.rest.pop(0)
            if move is not None:
                current.unloaded.append(move.model)
                if move.kind == "drop":
                    current.dropped.append(move.model)
                return move
        self._pass = None
        self._end(current)
        return None

    def _outlived(self, account: ModelEntry, now: float) -> Transition | None:
        """How to evict `account`, where its time is over."""
        kept = account.keep_alive_s is not None and account.keep_alive_s < 0
        if not account.movable or kept or account.broken or account.asked == "unload":
            return None
        if account.place == "offloaded" and now - account.offloaded_since >= self._options.host_idle_timeout_s:
            return Transition(model=account.id, kind="drop")
        keep_s = self._options.idle_timeout_s if account.keep_alive_s is None else account.keep_alive_s
        if account.place == "resident" and now - account.last_used >= keep_s:
            return self._room.evict(account)
        return None

    def _end(self, ended: _Pass) -> None:
        speaking = any(account.references for account in self._ledger)
        if not ended.unloaded and (ended.by_hand or not speaking):
            # Every move gives caches back, but there was none; who speaks would have to allocate them again.
            self._probe.reclaim(collect=False)
        self.last = CleanupPass(
            timestamp=ended.timestamp,
            vram_before_bytes=ended.before_bytes,
            vram_after_bytes=self._probe.device().ours_bytes,
            models_checked=ended.checked,
            models_unloaded=list(dict.fromkeys(ended.unloaded)),
            models_dropped=ended.dropped,
        )
