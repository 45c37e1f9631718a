"""The limits of a key: what is let pass, what is refused, and when it is free again."""

import random

import msgspec
import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.keys.limits import DAY_S, MINUTE_S, LimitCounter
from shared.protocol import KeyLimits, RateLimit
from tests.gpu_worker.fakes import FakeClock

NOON = 20_000 * DAY_S + DAY_S / 2


class Counted:
    """LimitCounter on fake clocks."""

    def __init__(self) -> None:
        self.clock, self.wall = FakeClock(), FakeClock()
        self.wall.now = NOON
        self.limits = LimitCounter(self.clock, self.wall)

    def request(self, limits: KeyLimits, *, client: str = "key:a", characters: int = 1) -> RateLimit | None:
        """A request that begins; JobError if it is over a limit."""
        self.limits.check(client, limits, characters)
        return self.limits.count(client, limits, characters)

    def refusal(self, limits: KeyLimits, **request: int) -> JobError:
        """The error of a request that is refused."""
        with pytest.raises(JobError) as raised:
            self.request(limits, **request)  # type: ignore[arg-type] # characters
        assert raised.value.code == "rate_limit_exceeded"
        assert raised.value.limit in msgspec.structs.asdict(limits)
        return raised.value


def test_no_limits() -> None:
    """A client without limits is not even counted."""
    counted = Counted()
    assert [counted.request(KeyLimits()) for _ in range(1000)] == [None] * 1000
    counted.limits.end("key:a", KeyLimits())


class TestRequestsAMinute:
    """Sixty at once, then one a second."""

    LIMITS = KeyLimits(requests_per_minute=60)

    def test_a_whole_minute_at_once(self) -> None:
        """The state counts down; the refusal says when the next one is free, and that one is."""
        counted = Counted()
        states = [counted.request(self.LIMITS) for _ in range(60)]
        assert [state.remaining for state in states if state] == list(range(59, -1, -1))
        assert states[-1] == RateLimit(limit=60, remaining=0, reset_s=pytest.approx(60.0))
        error = counted.refusal(self.LIMITS)
        assert error.message == "this API key is limited to 60 requests a minute"
        assert error.retry_after_s == pytest.approx(1.0)
        counted.clock.advance(error.retry_after_s or 0)
        assert counted.request(self.LIMITS) == RateLimit(limit=60, remaining=0, reset_s=pytest.approx(60.0))
        assert counted.refusal(self.LIMITS).retry_after_s == pytest.approx(1.0)

    def test_a_quiet_minute_frees_all(self) -> None:
        """And no more than all."""
        counted = Counted()
        for _ in range(60):
            counted.request(self.LIMITS)
        counted.clock.advance(10 * MINUTE_S)
        assert counted.request(self.LIMITS) == RateLimit(limit=60, remaining=59, reset_s=pytest.approx(1.0))

    def test_one_key_does_not_use_up_another(self) -> None:
        """Each has its own count."""
        counted = Counted()
        limits = KeyLimits(requests_per_minute=1)
        counted.request(limits, client="key:a")
        counted.request(limits, client="key:b")
        counted.refusal(limits)

    @pytest.mark.parametrize("limit", [1, 7, 60, 240])
    def test_never_more_than_the_limit(self, limit: int) -> None:
        """In any time, a key that asks without a pause gets exactly the limit and what has become free since."""
        counted = Counted()
        limits = KeyLimits(requests_per_minute=limit)
        random_ = random.Random(limit)  # noqa: S311 -- the same run again
        began, passed = counted.clock.now, 0
        for _ in range(3000):
            counted.clock.advance(random_.choice((0.0, 0.0, 0.01, random_.uniform(0, 0.3))))
            try:
                counted.request(limits)
            except JobError:
                continue
            passed += 1
        free = limit + (counted.clock.now - began) * limit / MINUTE_S
        assert free - 1 <= passed <= free


class TestCharactersADay:
    """They count from midnight to midnight, UTC."""

    LIMITS = KeyLimits(characters_per_day=100)

    def test_until_they_are_used_up(self) -> None:
        """A shorter text may still pass; the error says how many are left, and when there are more."""
        counted = Counted()
        counted.request(self.LIMITS, characters=95)
        error = counted.refusal(self.LIMITS, characters=6)
        assert error.message == "this API key is limited to 100 characters a day (5 are left)"
        assert error.retry_after_s == DAY_S / 2
        counted.request(self.LIMITS, characters=5)
        counted.refusal(self.LIMITS, characters=1)

    def test_text_in_pieces(self) -> None:
        """The text of an open request counts as it comes; what was refused does not."""
        counted = Counted()
        counted.request(self.LIMITS, characters=95)
        with pytest.raises(JobError, match="5 are left"):
            counted.limits.add_characters("key:a", self.LIMITS, 6)
        counted.limits.add_characters("key:a", self.LIMITS, 5)
        counted.refusal(self.LIMITS, characters=1)

    def test_midnight(self) -> None:
        """A second before it nothing is free, at midnight everything is."""
        counted = Counted()
        counted.request(self.LIMITS, characters=100)
        counted.wall.advance(DAY_S / 2 - 1)
        counted.refusal(self.LIMITS, characters=1)
        counted.wall.advance(1)
        counted.request(self.LIMITS, characters=100)


class TestRequestsAtOnce:
    """A request is open from the queue to its end."""

    def test_until_one_ends(self) -> None:
        """The third waits for the end of another one."""
        counted = Counted()
        limits = KeyLimits(concurrent_requests=2)
        counted.request(limits)
        counted.request(limits)
        assert counted.refusal(limits).retry_after_s == 1.0
        counted.limits.end("key:a", limits)
        counted.request(limits)
        counted.refusal(limits)
