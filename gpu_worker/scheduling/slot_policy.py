"""The policy of slots: which request is parked for another, and which one comes back. Plain data in, plain data out.

A slot belongs to the request that needs it most: the one with the least audio in hand.
In hand are the seconds of audio that have been made and that the request's listener has not heard yet.
A listener hears a second a second from the first piece on, and nothing while its reader takes nothing.

- A request that waits for its text makes no audio, so it gives its slot to any other.
- A newcomer has nothing in hand. It gets a slot from the request with the most, if that one has MIN_IN_HAND_S.
  If the device does not keep up, and parked requests have less, it need only have more than one of these.
- A parked request is hungry below HUNGRY_BELOW_S. It gets a slot from a request with RETURN_MARGIN_S more in hand.
- A hungry request comes after NEWCOMERS_IN_A_ROW newcomers at the latest. Then it takes a slot from any with more.
- Other free slots go to the parked request with the least in hand.
- Until a newcomer has made its first audio, the requests with MIN_IN_HAND_S leave it the device.
  The others leave it one step, but never two in a row.
- No request is parked before it has held its slot for MIN_SLICE_S.
- A request that yields (a batch request) gives its slot and the device to any that does not, at once.
  Once parked, it waits for a free slot. As a newcomer it takes one from none but another that yields.

It knows neither engines nor messages; see `slots` for these, and `requests.audio_buffer` for the bytes.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from gpu_worker.requests import MIN_SLICE_S

MIN_IN_HAND_S: Final = 1.0
"""A request with less is not parked for a newcomer: it could not be back in its slot before its listener waits.

It leaves a newcomer no two steps in a row, either.
"""

HUNGRY_BELOW_S: Final = 3.0
"""A parked request with less in hand takes a slot from one with more."""

RETURN_MARGIN_S: Final = 3.0
"""How much more that one must have. So two requests swap once in several seconds of audio at most."""

NEWCOMERS_IN_A_ROW: Final = 3
"""A newcomer takes a slot for a second of audio, a hungry one for RETURN_MARGIN_S: each kind has half of the time."""

FIRST_AUDIO_S: Final = 0.2
"""How long the others wait for a newcomer's first audio."""


class Holding(msgspec.Struct, frozen=True):
    """A request with a slot or parked. `slice_s`: how long it has held its slot. `has_spoken`: it has made audio.

    `waits_for_text`: it is an open one that can make no audio before more of its text comes.
    `yields`: no listener waits for the speech, so other requests come first.
    """

    job_id: str
    in_hand_s: float
    slice_s: float = 0.0
    has_spoken: bool = True
    waits_for_text: bool = False
    yields: bool = False

    @property
    def is_hungry(self) -> bool:
        """True if its listener, if it has one, will soon have nothing to hear."""
        return self.in_hand_s < HUNGRY_BELOW_S and not self.yields


def next_to_park(
    running: Sequence[Holding],
    waiting: Holding | None,
    *,
    yields: bool = False,
    least_parked_s: float = math.inf,
    its_turn: bool = False,
) -> Holding | None:
    """The running request that gives its slot to the parked `waiting`, or to a newcomer (None); None if none does.

    `yields`: the newcomer is a batch request.

    `least_parked_s`: the least audio in hand of a parked request. One that gives its slot to a newcomer has either
    MIN_IN_HAND_S, or more than that: where listeners wait already, no newcomer waits for all of them.
    `its_turn`: `waiting` comes after newcomers, for each of which a request may have been parked with as little.
    """
    if not yields and (waiting is None or waiting.is_hungry):
        batch = [holding for holding in running if holding.yields]
        if batch:
            return max(batch, key=lambda holding: holding.in_hand_s)
    able = (holding for holding in running if holding.slice_s >= MIN_SLICE_S and (holding.yields or not yields))
    most = max(able, key=lambda holding: (holding.waits_for_text, holding.in_hand_s), default=None)
    if most is None or most.waits_for_text:
        return most
    if waiting is None:
        gives = most.in_hand_s >= MIN_IN_HAND_S or most.in_hand_s > least_parked_s
    elif its_turn:
        gives = waiting.is_hungry and most.in_hand_s > waiting.in_hand_s
    else:
        gives = waiting.is_hungry and most.in_hand_s >= waiting.in_hand_s + RETURN_MARGIN_S
    return most if gives else None


def next_to_wait(running: Sequence[Holding], waited: Collection[str]) -> list[str]:
    """The jobs with a slot that leave the next step to a newcomer, until it has made its first audio.

    `waited`: the jobs that the step before it left out. A step of one job is several times shorter than one of all
    slots, so a listener who has nothing in hand waits for a fraction of a step. A newcomer has FIRST_AUDIO_S for its
    first audio.
    """
    newcomers = [
        holding
        for holding in running
        if not (holding.has_spoken or holding.waits_for_text or holding.slice_s > FIRST_AUDIO_S)
    ]
    if not newcomers:
        return []
    has_listener = not all(newcomer.yields for newcomer in newcomers)
    return [
        holding.job_id
        for holding in running
        if (holding.yields and has_listener)
        or (holding.has_spoken and (holding.in_hand_s >= MIN_IN_HAND_S or holding.job_id not in waited))
    ]


def next_to_unpark(parked: Iterable[Holding]) -> Holding | None:
    """The parked request that comes back first: the one with the least in hand, of equal ones the first.

    One that yields comes after all others.
    """
    return min(parked, key=lambda holding: (holding.yields, holding.in_hand_s), default=None)
