"""Who comes to the device next, who waits until there is room, and who is refused.

It decides neither who leaves for whom (see room.py) nor what is done with files (see errands.py).
Owned by the synthesis thread alone; its time is a clock that is passed in.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec

from gpu_worker.residency.errands import Errands
from gpu_worker.residency.ledger import ModelEntry, ModelTable
from gpu_worker.residency.memory import MemoryProbe
from gpu_worker.residency.moves import Transition
from gpu_worker.residency.room import Room

BUSY_RETRY_S: Final = 5.0
"""Retry-After of a load that fits once models that now speak are idle: a request takes seconds.

So often at most the figures are read again for a model that found no room.
"""

FULL_RETRY_S: Final = 60.0
"""Retry-After of a load that needs somebody to give memory back, unpin a model or raise the budget."""

ROOM_WAIT_S: Final = 30.0
"""How long a model that would fit if busy ones were idle waits for that before its requests are refused."""

ROOM_LOOK_S: Final = 0.2
"""How often the figures are read meanwhile, beside every time that a model becomes idle: NVML takes a millisecond."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A wanted model cannot be brought to the device now: its requests and calls are to fail with this.

    `code` is `insufficient_vram` (the message has the arithmetic) or `model_unavailable`.
    It is repeated by every `plan` while the model still has references.
    """

    model: str
    code: Literal["insufficient_vram", "model_unavailable"]
    message: str
    retry_after_s: float


class Arrivals:
    """The wanted models of `ledger`, in the order in which they began to be wanted.

    `expected` are the models of the start that are still to come: not there yet, not refused, not unloaded by hand.
    """

    def __init__(
        self, ledger: ModelTable, errands: Errands, room: Room, probe: MemoryProbe, clock: Callable[[], float]
    ) -> None:
        self._ledger = ledger
        self._errands = errands
        self._room = room
        self._probe = probe
        self._clock = clock
        self._turns = itertools.count(1)
        self._of_the_start: list[str] = []
        self._room_looked_at = -math.inf
        self.expected: list[str] = []

    def expect(self, models: Sequence[str]) -> None:
        """These are the models of the start: none of them leaves for another of them."""
        self._of_the_start = list(models)
        self.expected = list(models)

    def expect_no_longer(self, model: str) -> None:
        """The start does not wait for the model any longer."""
        if model in self.expected:
            self.expected.remove(model)

    def want(self, account: ModelEntry) -> None:
        """Somebody is about to want the model: where nobody did, it queues up behind those that wait."""
        if not account.wanted:
            account.wanted_turn = next(self._turns)
            account.short_since = None
            account.retried = False
            self._errands.look_again(account.id)

    def arrived(self, account: ModelEntry) -> None:
        """The model is on the device."""
        account.asked = None if account.asked == "load" else account.asked
        account.trouble, account.trouble_looked_at = "", None
        device = self._probe.device()
        if self._is_for_the_start(account) and self._ledger.held_bytes(device) > device.budget_bytes:
            self._room.leave(account)  # larger than thought: it leaves, and not those that came before it
        self.expect_no_longer(account.id)

    def figures_changed(self) -> None:
        """A model may be evicted, or has another size, that was not so before: the figures are to be read again."""
        self._room.check_budgets()
        self._room_looked_at = -math.inf

    def forget_shortages(self) -> None:
        """A model that found no room is in no trouble any more once it could come."""
        now = self._clock()
        for account in self._ledger:
            if account.trouble_looked_at is not None and now - account.trouble_looked_at >= BUSY_RETRY_S:
                shortage = self._ledger.shortage(account, self._probe.device())
                account.trouble_looked_at = now
                if shortage is None or shortage.curable or self._room.loads_anew(account, shortage, ()):
                    account.trouble, account.trouble_looked_at = "", None

    def next_move(self, refusals: list[Transition | Refusal]) -> Transition | None:
        """The next move towards a wanted model, the longest waiting first; what cannot come goes to `refusals`."""
        now = self._clock()
        looks = now - self._room_looked_at >= ROOM_LOOK_S
        for account in self._ledger.waiting():
            if account.place == "absent" and self._errands.is_in_the_way(account.id):
                continue
            if account.place == "absent" and (problem := self._errands.problem(account.id)):
                message = f"{account.id}: {problem}"
                refusals.append(self.refuse(account, "model_unavailable", message, FULL_RETRY_S))
                continue
            if account.short_since is not None and not looks:
                continue
            decision = self._fit(account, now)
            if isinstance(decision, Transition):
                return decision
            if decision is not None:
                refusals.append(decision)
            self._room_looked_at = now
        return None

    def refuse(
        self,
        account: ModelEntry,
        code: Literal["insufficient_vram", "model_unavailable"],
        message: str,
        retry_after_s: float,
    ) -> Refusal:
        """The model does not come: whoever wants it is to hear of it, and a load by hand is forgotten."""
        account.asked = None if account.asked == "load" else account.asked
        account.retried = False
        account.short_since = None
        account.trouble = "" if self._errands.problem(account.id) else message
        account.trouble_looked_at = self._clock() if code == "insufficient_vram" else None
        self._errands.look_again(account.id)
        self.figures_changed()
        self.expect_no_longer(account.id)
        return Refusal(model=account.id, code=code, message=message, retry_after_s=retry_after_s)

    def _fit(self, account: ModelEntry, now: float) -> Transition | Refusal | None:
        """Bring the model to the device, or evict what has to leave before, or say why that does not help.

        None: it waits for busy models to become idle.
        """
        spared = self._of_the_start if self._is_for_the_start(account) else ()
        shortage = self._room.shortage(account, spared)
        if shortage is None:
            return Transition(model=account.id, kind="load" if account.place == "absent" else "restore")
        if self._room.loads_anew(account, shortage, spared):
            return Transition(model=account.id, kind="drop")
        if not shortage.curable:
            if account.short_since is None:
                account.short_since = now
            if shortage.passing and now - account.short_since < ROOM_WAIT_S:
                return None
            retry_after_s = BUSY_RETRY_S if shortage.passing else FULL_RETRY_S
            return self.refuse(account, "insufficient_vram", shortage.message, retry_after_s)
        return self._room.cure(shortage)

    def _is_for_the_start(self, account: ModelEntry) -> bool:
        """Whether nobody but the start wants the model."""
        return account.id in self.expected and account.references == 0
