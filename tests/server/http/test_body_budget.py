"""Which bodies are refused when all of them together are too large."""

from collections import Counter

import pytest

from server.http.body_budget import SMALL_BODY_BYTES, BodyBudget
from server.http.open_requests import OpenRequest
from shared.protocol import LimitName

BUDGET = 1_000_000
NOW = 100.0


def body(budget: BodyBudget, size: int, *, seconds: float = 1.0, complete: bool = False) -> OpenRequest:
    """A body of which `size` bytes have arrived within so many seconds."""
    request = OpenRequest(None, NOW - seconds, complete, size)
    budget.check(request, NOW)
    return request


@pytest.fixture
def budget() -> BodyBudget:
    """A budget of a megabyte."""
    return BodyBudget(BUDGET)


def test_the_slowest_goes() -> None:
    """Above the budget the slowest large body that still arrives is refused, and as many as needed; each is counted."""
    limit_hits: Counter[LimitName] = Counter()
    budget = BodyBudget(BUDGET, limit_hits)
    fast = body(budget, 300_000)
    slow = body(budget, 300_000, seconds=10)
    slower = body(budget, 300_000, seconds=20)
    complete = body(budget, 90_000, seconds=50, complete=True)
    assert not any(request.crowded_out for request in (fast, slow, slower, complete))
    newcomer = body(budget, 400_000)
    refused = [request.crowded_out for request in (fast, slow, slower, complete, newcomer)]
    assert refused == [False, True, True, False, False]
    assert limit_hits == {"body_memory": 2}


def test_small_bodies_always_fit(budget: BodyBudget) -> None:
    """Where complete bodies take all of the budget, a small one is accepted and a large one refused."""
    complete = [body(budget, BUDGET // 2, complete=True) for _ in range(2)]
    small = body(budget, SMALL_BODY_BYTES, seconds=20)
    large = body(budget, SMALL_BODY_BYTES + 1)
    assert [request.crowded_out for request in (*complete, small, large)] == [False, False, False, True]
    budget.release(complete[0])
    assert not body(budget, BUDGET // 3).crowded_out


def test_one_body_alone_may_be_larger(budget: BodyBudget) -> None:
    """A single body is limited by TTS_MAX_BODY_MB alone."""
    assert not body(budget, 3 * BUDGET).crowded_out
