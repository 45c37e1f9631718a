from typing import Any

import pytest
import torch

from gpu_worker.engines.qwen.runtime.captured_buckets import (
    BATCH_SIZES,
    BucketedFunction,
    CapturedBuckets,
    Inputs,
    padded,
    smallest_bucket,
)
from gpu_worker.engines.qwen.runtime.cuda_graphs import Key
from tests.gpu_worker.engines.qwen.fake_graphs import FakeCapture

STREAMS: Any = {"capturing": "capturing", "warming": "warming"}


def doubling() -> BucketedFunction:
    """A function that doubles [batch, length] values in place."""

    def double(_batch: int, _length: int, inputs: Inputs) -> None:
        inputs[0].mul_(2)

    def new_inputs(batch: int, length: int) -> Inputs:
        return (torch.ones(batch, length),)

    return BucketedFunction("double", double, batch_sizes=(1, 4), lengths=(8, 16), new_inputs=new_inputs)


def test_the_smallest_bucket_holds_the_number() -> None:
    """A number beyond the largest bucket is an error of the caller."""
    assert [smallest_bucket(number, BATCH_SIZES) for number in (1, 3, 17, 128)] == [1, 4, 24, 128]
    with pytest.raises(ValueError, match="129"):
        smallest_bucket(129, BATCH_SIZES)


def test_numbers_are_padded_to_the_bucket() -> None:
    """Padding stands behind the numbers, and a full bucket has none."""
    assert padded([5, 6], 4, 9) == [5, 6, 9, 9]
    assert padded([5, 6], 2, 9) == [5, 6]


def test_buckets_are_captured_largest_first() -> None:
    """In the order of the functions, so that a function's smaller buckets fit into the memory of its larger ones."""
    fake = FakeCapture()
    small = BucketedFunction("small", lambda *_: None, batch_sizes=(1, 2))
    CapturedBuckets(fake).capture([doubling(), small], **STREAMS)
    assert list(fake.graphs) == [
        *(("double", 4, 16), ("double", 4, 8), ("double", 1, 16), ("double", 1, 8)),
        *(("small", 2, 0), ("small", 1, 0)),
    ]
    assert fake.streams == STREAMS


def test_a_captured_bucket_is_replayed_on_its_static_inputs() -> None:
    """Every other bucket runs eagerly, and has no static inputs. (The warm-up of the capture is the first doubling.)"""
    buckets = CapturedBuckets(FakeCapture())
    buckets.capture([doubling()], **STREAMS)
    eager: list[Key] = []
    for key in (("double", 4, 8), ("double", 4, 9), ("another", 4, 8)):
        buckets.run(key, lambda key=key: eager.append(key))  # type: ignore[misc]
    assert eager == [("double", 4, 9), ("another", 4, 8)]
    assert buckets.inputs(("double", 4, 9)) is None
    (values,) = buckets.inputs(("double", 4, 8)) or ()
    assert torch.equal(values, torch.full((4, 8), 4.0))
    (values,) = buckets.inputs(("double", 1, 8)) or ()
    assert torch.equal(values, torch.full((1, 8), 2.0))


def test_released_buckets_hold_no_memory() -> None:
    """Graphs and inputs are counted while they are there; a second capture makes both again."""
    buckets = CapturedBuckets(FakeCapture())
    assert buckets.memory() == {"graphs": 0, "workspace": 0}
    for _ in range(2):
        buckets.capture([doubling()], **STREAMS)
        assert buckets.memory() == {"graphs": 7, "workspace": (4 + 1) * (8 + 16) * 4}
        buckets.release()
        assert buckets.memory() == {"graphs": 0, "workspace": 0}
        assert buckets.inputs(("double", 4, 8)) is None
