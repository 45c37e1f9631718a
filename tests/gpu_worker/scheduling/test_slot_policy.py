"""Who gives a slot to whom, with plain data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.scheduling.slot_policy import (
    FIRST_AUDIO_S,
    HUNGRY_BELOW_S,
    MIN_IN_HAND_S,
    MIN_SLICE_S,
    RETURN_MARGIN_S,
    Holding,
    next_to_park,
    next_to_unpark,
    next_to_wait,
)


def _running(**in_hand_s: float) -> list[Holding]:
    return [Holding(name, seconds, slice_s=1.0) for name, seconds in in_hand_s.items()]


FRESH = Holding("fresh", 0.0, slice_s=0.01, has_spoken=False)
"""A newcomer."""


class TestPark:
    """The request that gives up its slot."""

    def test_the_one_with_the_most(self) -> None:
        """A newcomer gets the slot of the request with the most audio in hand."""
        chosen = next_to_park(_running(a=4.0, b=9.0, c=6.0), None)
        assert chosen is not None
        assert chosen.job_id == "b"

    def test_none_has_enough(self) -> None:
        """A request with little in hand keeps its slot, also from a newcomer."""
        assert next_to_park(_running(a=0.0, b=MIN_IN_HAND_S - 0.01), None) is None
        assert next_to_park(_running(a=MIN_IN_HAND_S), None) is not None

    def test_listeners_wait_already(self) -> None:
        """Where a parked request has less, a newcomer gets the slot of the one with the most, as little as that is."""
        slots = _running(a=0.3, b=0.2)
        chosen = next_to_park(slots, None, least_parked_s=0.1)
        assert chosen is not None
        assert chosen.job_id == "a"
        assert next_to_park(slots, None, least_parked_s=0.3) is None
        assert next_to_park(_running(a=0.0, b=0.0), None, least_parked_s=0.0) is None

    def test_for_a_hungry_one(self) -> None:
        """A parked request that runs dry needs a request with RETURN_MARGIN_S more."""
        hungry = Holding("h", 1.0)
        assert next_to_park(_running(a=0.9 + RETURN_MARGIN_S), hungry) is None
        chosen = next_to_park(_running(a=1.0 + RETURN_MARGIN_S), hungry)
        assert chosen is not None

    def test_its_turn(self) -> None:
        """After some newcomers, a parked request that runs dry takes a slot from any that has more."""
        hungry = Holding("h", 1.0)
        assert next_to_park(_running(a=1.0), hungry, its_turn=True) is None
        chosen = next_to_park(_running(a=1.1), hungry, its_turn=True)
        assert chosen is not None
        assert next_to_park(_running(a=9.0), Holding("h", HUNGRY_BELOW_S), its_turn=True) is None

    def test_for_one_with_enough(self) -> None:
        """A parked request that has enough takes no slot from another."""
        assert next_to_park(_running(a=1_000.0), Holding("h", HUNGRY_BELOW_S)) is None

    @pytest.mark.parametrize("waiting", [None, Holding("h", 0.0)])
    def test_a_new_slot_is_kept(self, waiting: Holding | None) -> None:
        """A request that has just got its slot keeps it; the one with the most of the others gives up its own."""
        fresh = Holding("fresh", 90.0, slice_s=MIN_SLICE_S / 2)
        assert next_to_park([fresh], waiting) is None
        chosen = next_to_park([fresh, *_running(a=10.0)], waiting)
        assert chosen is not None
        assert chosen.job_id == "a"


class TestWait:
    """Requests that leave the device to a newcomer."""

    def test_until_its_first_audio(self) -> None:
        """Requests with some audio in hand wait while a newcomer has made none; others leave it a step, but not two."""
        comfortable, needy = _running(a=MIN_IN_HAND_S, b=MIN_IN_HAND_S / 2)
        assert next_to_wait([comfortable, needy, FRESH], ()) == ["a", "b"]
        assert next_to_wait([comfortable, needy, FRESH], ["a", "b"]) == ["a"]
        assert next_to_wait([comfortable, needy], ()) == []

    def test_not_for_ever(self) -> None:
        """A newcomer that waits for something else, such as its recording, holds back no other for long."""
        slow = Holding("slow", 0.0, slice_s=FIRST_AUDIO_S + 0.01, has_spoken=False)
        assert next_to_wait([*_running(a=9.0), slow], ()) == []

    @given(
        st.lists(st.floats(0, 5), min_size=1, max_size=8),
        st.lists(st.booleans(), min_size=20, max_size=60),
        st.floats(0.01, 0.1),
    )
    def test_nobody_waits_past_its_margin(self, in_hand_s: list[float], newcomers: list[bool], step_s: float) -> None:
        """However many newcomers come, requests with a margin keep it, and one with less is in every other step.

        Each step takes as long as it may where the device keeps up: every second one makes more than is heard.
        """
        margins, waited = dict(enumerate(in_hand_s)), set[str]()
        lowest = {number: min(margin, MIN_IN_HAND_S) - 2 * step_s for number, margin in margins.items()}
        for newcomer in newcomers:
            running = [Holding(str(number), margin) for number, margin in margins.items()]
            left_out = set(next_to_wait([*running, FRESH] if newcomer else running, waited))
            assert FRESH.job_id not in left_out
            for number, margin in margins.items():
                if str(number) in left_out:
                    assert margin >= MIN_IN_HAND_S or str(number) not in waited
                margins[number] = margin - step_s + (0 if str(number) in left_out else 2 * step_s)
                assert margins[number] >= lowest[number] - 1e-9
            waited = left_out


class TestBatch:
    """Requests that yield to others."""

    BATCH = Holding("batch", 0.0, slice_s=0.0, yields=True)

    def test_gives_its_slot_to_a_newcomer_at_once(self) -> None:
        """With nothing in hand and a slot that is new; before any that has plenty."""
        chosen = next_to_park([self.BATCH, *_running(a=90.0)], None)
        assert chosen == self.BATCH

    def test_gives_its_slot_to_a_hungry_one(self) -> None:
        """That one need not have less in hand."""
        assert next_to_park([self.BATCH], Holding("h", HUNGRY_BELOW_S - 0.1)) == self.BATCH
        assert next_to_park([self.BATCH], Holding("h", HUNGRY_BELOW_S)) is None

    def test_takes_no_slot_from_a_listener(self) -> None:
        """Neither as a newcomer nor when it comes back. As a newcomer it takes one of another that yields."""
        ahead = Holding("ahead", 90.0, slice_s=1.0, yields=True)
        assert next_to_park(_running(a=90.0), None, yields=True) is None
        assert next_to_park([self.BATCH], None, yields=True) is None
        assert next_to_park([*_running(a=99.0), ahead], None, yields=True) == ahead
        assert next_to_park([*_running(a=99.0), ahead], self.BATCH) is None

    def test_leaves_the_device_to_a_newcomer(self) -> None:
        """Until the first audio of one that somebody listens to."""
        newcomer = Holding("new", 0.0, slice_s=0.01, has_spoken=False)
        assert next_to_wait([self.BATCH, newcomer], ["batch"]) == ["batch"]
        assert (
            next_to_wait([self.BATCH, Holding("b2", 0.0, slice_s=0.01, has_spoken=False, yields=True)], ["batch"]) == []
        )

    def test_comes_back_last(self) -> None:
        """After every parked request that somebody listens to."""
        listener = Holding("a", 20.0)
        assert next_to_unpark([self.BATCH, listener]) == listener


class TestUnpark:
    """The parked request that comes back."""

    def test_the_one_with_the_least(self) -> None:
        """The request with the least in hand is first; of equal ones, the one that was parked first."""
        parked = [Holding("a", 4.0), Holding("b", 0.0), Holding("c", 0.0)]
        chosen = next_to_unpark(parked)
        assert chosen is not None
        assert chosen.job_id == "b"
        assert next_to_unpark([]) is None


@given(
    st.lists(st.tuples(st.floats(0, 1_000), st.floats(0, 10)), max_size=8),
    st.lists(st.floats(0, 1_000), min_size=1, max_size=8),
)
def test_no_two_swap_back_and_forth(running: list[tuple[float, float]], parked: list[float]) -> None:
    """After a swap, the request that was parked takes no slot back: it has more than the others, and enough."""
    slots = [Holding(f"r{index}", *figures) for index, figures in enumerate(running)]
    waiting = next_to_unpark([Holding(f"p{index}", in_hand_s) for index, in_hand_s in enumerate(parked)])
    assert waiting is not None
    given_up = next_to_park(slots, waiting)
    if given_up is not None:
        assert given_up.in_hand_s > waiting.in_hand_s
        assert next_to_park([*slots, Holding(waiting.job_id, waiting.in_hand_s, 1.0)], given_up) is None
