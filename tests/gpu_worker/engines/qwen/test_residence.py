import pytest
import torch

from gpu_worker.engines.qwen.residence import Residence


def test_scratch_is_freed_and_comes_back_empty() -> None:
    """On CPU the weights stay where they are; scratch memory goes, and views of it survive."""
    weight, scratch = torch.arange(10.0), torch.ones(4, 8)
    view = scratch[:, 2:3]
    residence = Residence([weight, weight, scratch], {"kv": [scratch]}, torch.device("cpu"))
    assert residence.memory(references=5).device == {"weights": 40, "kv": 128, "references": 5}
    residence.offload()
    assert scratch.untyped_storage().nbytes() == 0
    assert residence.memory().host == {"weights": 40}
    assert residence.memory().device == {}
    residence.restore()
    assert torch.equal(weight, torch.arange(10.0))
    assert torch.equal(scratch, torch.zeros(4, 8))
    scratch[1, 2] = 7
    assert view[1, 0] == 7
    residence.close()
    assert weight.untyped_storage().nbytes() == 0
    assert residence.memory().device == {}


def test_a_failed_restore_leaves_everything_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory runs out midway, nothing is held, and the next restore can succeed."""
    tensors = [torch.ones(4), torch.ones(8)]
    residence = Residence([], {"a": tensors[:1], "b": tensors[1:]}, torch.device("cpu"))
    residence.offload()
    resize = torch.UntypedStorage.resize_

    def scarce(storage: torch.UntypedStorage, size: int) -> object:
        if size > 16:
            raise torch.OutOfMemoryError("made up")
        return resize(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        residence.restore()
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0]
    sizes: list[int] = []
    monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda _storage, size: sizes.append(size))
    residence.offload()
    assert sizes == [], "offloaded is offloaded: undoing the restore must not touch what is not there"
    monkeypatch.undo()
    residence.restore()
    assert torch.equal(tensors[1], torch.zeros(8))
