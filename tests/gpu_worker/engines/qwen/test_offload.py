import numpy as np
import pytest
import torch

from gpu_worker.engines.qwen.offload import WeightOffloader, offload_bytes, restore_bytes


def test_scratch_memory_is_freed_and_comes_back_as_zeros() -> None:
    """On CPU the weights stay where they are. Scratch memory is freed, and views of it stay valid."""
    weight, scratch = torch.arange(10.0), torch.ones(4, 8)
    view = scratch[:, 2:3]
    offloader = WeightOffloader([weight, weight, scratch], {"kv": [scratch]}, torch.device("cpu"))
    assert offloader.memory(references=5).device == {"weights": 40, "kv": 128, "references": 5}
    offloader.offload()
    assert scratch.untyped_storage().nbytes() == 0
    assert offloader.memory().host == {"weights": 40}
    assert offloader.memory().device == {}
    offloader.restore()
    assert torch.equal(weight, torch.arange(10.0))
    assert torch.equal(scratch, torch.zeros(4, 8))
    scratch[1, 2] = 7
    assert view[1, 0] == 7
    offloader.close()
    assert weight.untyped_storage().nbytes() == 0
    assert offloader.memory().device == {}


def test_a_failed_restore_leaves_everything_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory runs out midway, no memory is held, and the next restore can succeed."""
    tensors = [torch.ones(4), torch.ones(8)]
    offloader = WeightOffloader([], {"a": tensors[:1], "b": tensors[1:]}, torch.device("cpu"))
    offloader.offload()
    resize = torch.UntypedStorage.resize_

    def scarce(storage: torch.UntypedStorage, size: int) -> object:
        if size > 16:
            raise torch.OutOfMemoryError("made up")
        return resize(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        offloader.restore()
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0]
    sizes: list[int] = []
    monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda _storage, size: sizes.append(size))
    offloader.offload()
    assert sizes == [], "a second offload must not touch storages that are freed"
    monkeypatch.undo()
    offloader.restore()
    assert torch.equal(tensors[1], torch.zeros(8))


def test_a_restore_that_fails_late_leaves_everything_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if all memory could be allocated, and filling it failed."""
    scratch = torch.ones(4)
    offloader = WeightOffloader([], {"kv": [scratch]}, torch.device("cpu"))
    offloader.offload()

    def failing(_tensor: torch.Tensor) -> None:
        raise RuntimeError("made up")

    monkeypatch.setattr(torch.Tensor, "zero_", failing)
    with pytest.raises(RuntimeError, match="made up"):
        offloader.restore()
    assert scratch.untyped_storage().nbytes() == 0
    assert offloader.memory().device == {}
    monkeypatch.undo()
    offloader.restore()
    assert torch.equal(scratch, torch.zeros(4))


@pytest.mark.parametrize("sizes", [[], [1], [64], [63, 1, 65], [200, 7, 300, 0, 5], [64] * 4])
def test_bytes_go_through_the_host_unchanged(sizes: list[int]) -> None:
    """The blocks have one size, and the last one the smallest power of two that holds the rest."""
    parts = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    blocks = offload_bytes(parts, pinned=False, block_bytes=64)
    total = sum(sizes)
    assert [len(block) for block in blocks[:-1]] == [64] * (-(-total // 64) - 1 if total else 0)
    assert sum(len(block) for block in blocks) < max(total + 32, 2 * total, 1)
    back = [torch.zeros_like(part) for part in parts]
    restore_bytes(blocks, back)
    for one, other in zip(parts, back, strict=True):
        assert torch.equal(one, other)


def test_closing_succeeds_although_some_weights_cannot_be_freed() -> None:
    """Weights shared with numpy cannot, as on a CPU that computes in the file's dtype; all other memory is freed."""
    shared, scratch = torch.from_numpy(np.ones(4, dtype=np.float32)), torch.ones(4)
    closed: list[str] = []
    offloader = WeightOffloader(
        [shared], {"kv": [scratch]}, torch.device("cpu"), on_close=lambda: closed.append("closed")
    )
    offloader.close()
    assert closed == ["closed"]
    assert scratch.untyped_storage().nbytes() == 0
    assert offloader.memory().device == {}


def test_extra_memory_is_counted() -> None:
    """Bytes of one purpose are added up, and purposes without bytes are left out. `on_close` is called once."""
    closed: list[str] = []
    offloader = WeightOffloader(
        [torch.ones(2)],
        {},
        torch.device("cpu"),
        extra_memory=[lambda: {"graphs": 5, "workspace": 0}, lambda: {"graphs": 2}],
        on_close=lambda: closed.append("closed"),
    )
    assert offloader.memory(references=1).device == {"weights": 8, "references": 1, "graphs": 7}
    offloader.close()
    assert closed == ["closed"]
