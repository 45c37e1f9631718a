import numpy as np
import pytest
import torch

from gpu_worker.engines.qwen.offload import WeightOffloader, offload_bytes, restore_bytes


def test_scratch_is_freed_and_comes_back_empty() -> None:
    """On CPU the weights stay where they are; scratch memory goes, and views of it survive."""
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
    """Where memory runs out midway, nothing is held, and the next restore can succeed."""
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
    assert sizes == [], "offloaded is offloaded: undoing the restore must not touch what is not there"
    monkeypatch.undo()
    offloader.restore()
    assert torch.equal(tensors[1], torch.zeros(8))


def test_a_restore_that_fails_late_leaves_everything_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all memory was there, and it was filling it that failed."""
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
    """Packed into blocks of one size, and a last one that is no larger than it must be; each part comes back."""
    parts = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    blocks = offload_bytes(parts, pinned=False, block_bytes=64)
    total = sum(sizes)
    assert [len(block) for block in blocks[:-1]] == [64] * (-(-total // 64) - 1 if total else 0)
    assert sum(len(block) for block in blocks) < max(total + 32, 2 * total, 1)
    back = [torch.zeros_like(part) for part in parts]
    restore_bytes(blocks, back)
    for one, other in zip(parts, back, strict=True):
        assert torch.equal(one, other)


def test_closing_ends_where_weights_cannot_be_taken_from_their_holders() -> None:
    """Those that numpy has seen, as all that a CPU computes with in the dtype of the file: what can be is given up."""
    seen, scratch = torch.from_numpy(np.ones(4, dtype=np.float32)), torch.ones(4)
    closed: list[str] = []
    offloader = WeightOffloader(
        [seen], {"kv": [scratch]}, torch.device("cpu"), on_close=lambda: closed.append("closed")
    )
    offloader.close()
    assert closed == ["closed"]
    assert scratch.untyped_storage().nbytes() == 0
    assert offloader.memory().device == {}


def test_what_others_hold_is_counted_with_it() -> None:
    """By purpose, added up where several hold the same; what holds nothing is not mentioned. Closing is told, once."""
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
