"""The buffer's arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.requests.audio_buffer import FLOOR_BYTES, IN_FLIGHT_S, AudioBuffer, may_grow, may_park
from shared.pcm import bytes_for


class TestSetAside:
    """Room for the requests with a slot."""

    def test_floor_and_headroom(self) -> None:
        """A second of audio, and what an engine makes after it was told to stop, with its pauses."""
        buffer = AudioBuffer(10**9, pause_s=0.5)
        headroom = bytes_for(IN_FLIGHT_S + 1.0)
        assert buffer.set_aside(0) == bytes_for(1.0) + headroom
        assert buffer.set_aside(FLOOR_BYTES - 10) == 10 + headroom
        assert buffer.set_aside(10 * FLOOR_BYTES) == headroom


class TestMayGrow:
    """Which requests make more audio."""

    def test_floor(self) -> None:
        """A request at its floor goes on, however full the buffer is."""
        assert may_grow(FLOOR_BYTES, -5, in_utterance=False)
        assert not may_grow(FLOOR_BYTES + 1, -5, in_utterance=True)

    def test_as_much_as_is_free(self) -> None:
        """Beyond the floor, it may keep what stays free, and twice as much until its utterance ends."""
        free = 10 * FLOOR_BYTES
        assert may_grow(free, free, in_utterance=False)
        assert not may_grow(free + 1, free, in_utterance=False)
        assert may_grow(2 * free, free, in_utterance=True)
        assert not may_grow(2 * free + 1, free, in_utterance=True)


class TestMayPark:
    """Which jobs are parked."""

    @pytest.mark.parametrize(("parked", "free", "may"), [(5, 10, True), (6, 10, False), (0, 0, True), (0, -9, True)])
    def test_half_of_what_is_free(self, parked: int, free: int, *, may: bool) -> None:
        """A parked job leaves as much free as it takes. One that takes nothing can be parked always."""
        assert may_park(parked, free) is may


@given(st.lists(st.integers(0, 60), min_size=1, max_size=60), st.integers(1, 20))
def test_never_over_budget(order: list[int], requests: int) -> None:
    """However requests grow, within the rules and by what an engine makes at a time, the budget holds.

    Each goes on until it is held back, and then its engine makes what was under way: half of the headroom each.
    """
    step = bytes_for(IN_FLIGHT_S / 2)
    buffer = AudioBuffer(requests * (FLOOR_BYTES + bytes_for(IN_FLIGHT_S)) + 10 * FLOOR_BYTES)
    waiting = [0] * requests
    in_flight = [True] * requests

    def free() -> int:
        return buffer.budget_bytes - buffer.used_bytes - sum(buffer.set_aside(kept) for kept in waiting)

    def grow(index: int) -> None:
        waiting[index] += step
        buffer.add(step)

    for _ in order:
        free_bytes = free()
        able = [may_grow(kept, free_bytes, in_utterance=True) for kept in waiting]
        for index, may in enumerate(able):
            if may or in_flight[index]:
                grow(index)
            in_flight[index] = may
        assert buffer.used_bytes == sum(waiting) <= buffer.budget_bytes
    for index in order:
        buffer.add(-waiting[index % requests])
        waiting[index % requests] = 0
        in_flight[index % requests] = True
        assert free() <= buffer.budget_bytes
