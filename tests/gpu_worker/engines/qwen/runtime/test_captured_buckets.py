from typing import Any

import pytest
import torch

from gpu_worker.engines.qwen.runtime.captured_buckets import (
    BATCH_SIZES,
    CapturedBuckets,
    largest_first,
    padded,
    smallest_bucket,
)
from gpu_worker.engines.qwen.runtime.cuda_graphs import Key
from tests.gpu_worker.engines.qwen.fake_graphs import FakeCapture, FakePool


@pytest.fixture
def pool() -> FakePool:
    """The pool of all buckets' graphs."""
    return FakePool()


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch, pool: FakePool) -> CapturedBuckets:
    """A function that doubles [batch, length] ones in place, captured for two batch sizes with two lengths."""
    FakeCapture(monkeypatch)
    buckets = CapturedBuckets()
    functions: dict[Key, Any] = {}
    for batch, length in largest_first((1, 4), (8, 16)):
        (values,) = buckets.inputs["double", batch, length] = (torch.ones(batch, length),)
        functions["double", batch, length] = lambda values=values: values.mul_(2)
    capture(buckets, functions, pool)
    return buckets


def capture(buckets: CapturedBuckets, functions: Any, pool: Any) -> None:
    """Capture functions on fake streams."""
    streams: Any = {"capturing": "capturing", "warming": "warming"}
    buckets.capture(functions, pool=pool, **streams)


def test_the_smallest_bucket_holds_the_number() -> None:
    """A number beyond the largest bucket is an error of the caller."""
    assert [smallest_bucket(number, BATCH_SIZES) for number in (1, 3, 17, 128)] == [1, 4, 24, 128]
    with pytest.raises(ValueError, match="129"):
        smallest_bucket(129, BATCH_SIZES)


def test_numbers_are_padded_to_the_bucket() -> None:
    """Padding stands behind the numbers, and a full bucket has none."""
    assert padded([5, 6], 4, 9) == [5, 6, 9, 9]
    assert padded([5, 6], 2, 9) == [5, 6]


def test_the_largest_bucket_comes_first() -> None:
    """First by batch size, then by length."""
    assert list(largest_first((1, 4), (8, 16))) == [(4, 16), (4, 8), (1, 16), (1, 8)]


def test_a_captured_bucket_is_replayed_on_its_static_inputs(buckets: CapturedBuckets) -> None:
    """Every other bucket runs eagerly, and the caller learns which. (The capture's warm-up is the first doubling.)"""
    eager: list[Key] = []
    for key, captured in ((("double", 4, 8), True), (("double", 4, 9), False), (("another", 4, 8), False)):
        assert buckets.run(key, lambda key=key: eager.append(key)) is captured  # type: ignore[misc]
    assert eager == [("double", 4, 9), ("another", 4, 8)]
    assert torch.equal(buckets.inputs["double", 4, 8][0], torch.full((4, 8), 4.0))
    assert torch.equal(buckets.inputs["double", 1, 8][0], torch.full((1, 8), 2.0))


def test_only_the_first_capture_needs_a_warm_up(buckets: CapturedBuckets, pool: FakePool) -> None:
    """A restore calls each function once, not twice: here not at all, as the fake captures without calling."""
    buckets.release()
    capture(buckets, {("double", 1, 8): lambda: pytest.fail("warmed up again")}, pool)
    buckets.release()


def test_released_buckets_hold_no_memory(buckets: CapturedBuckets, pool: FakePool) -> None:
    """Graphs and inputs are counted while they are there; afterwards everything runs eagerly."""
    assert buckets.memory() == {"graphs": 7, "workspace": (4 + 1) * (8 + 16) * 4}
    assert pool.users == 1
    buckets.release()
    buckets.release()
    assert pool.users == 0
    assert buckets.memory() == {"graphs": 0, "workspace": 0}
    eager: list[None] = []
    buckets.run(("double", 4, 8), lambda: eager.append(None))
    assert len(eager) == 1
