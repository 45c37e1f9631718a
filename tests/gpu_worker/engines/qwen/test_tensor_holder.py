import torch

from gpu_worker.engines.qwen.tensor_holder import TensorHolder


def test_tensors_are_found_in_every_attribute() -> None:
    """An attribute may be a tensor, another TensorHolder, or a list of both."""

    class Inner(TensorHolder):
        def __init__(self) -> None:
            self.one = torch.ones(1)

    class Outer(TensorHolder):
        def __init__(self) -> None:
            self.list = [torch.ones(2), Inner()]
            self.other = "not a tensor"

    assert [len(tensor) for tensor in Outer().tensors()] == [2, 1]
