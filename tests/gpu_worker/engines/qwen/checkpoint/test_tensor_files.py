"""safetensors files: the header shows damage, and tensors come in the requested dtype."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.checkpoint.tensor_files import (
    find_tensor_files,
    load_tensors,
    open_tensors,
    read_headers,
    require_tensors,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of three tensors."""
    path = tmp_path / "model.safetensors"
    tensors = {"a.x": torch.arange(6.0).view(2, 3), "a.ids": torch.arange(4), "b.y": torch.ones(5)}
    save_file(tensors, path)
    return path


def test_tensors_of_a_prefix_come_in_the_requested_dtype(file: Path) -> None:
    """Floating-point tensors are converted, integers are not, and other prefixes are left out."""
    tensors = load_tensors([file], "a.", dtype=torch.bfloat16)

    assert {name: tensor.dtype for name, tensor in tensors.items()} == {"a.x": torch.bfloat16, "a.ids": torch.int64}
    assert torch.equal(tensors["a.x"].float(), torch.arange(6.0).view(2, 3))


def test_none_keeps_the_dtype_of_the_file(file: Path) -> None:
    """Without a dtype, tensors keep the dtype of the file."""
    assert load_tensors([file], "b.", dtype=None)["b.y"].dtype is torch.float32


def test_open_tensors_are_read_at_each_lookup(file: Path) -> None:
    """`nbytes` needs no reading and counts the converted dtype; two lookups give two tensors."""
    with open_tensors([file], "a.", dtype=torch.bfloat16) as tensors:
        assert tensors.nbytes == 6 * 2 + 4 * 8
        assert list(tensors) == ["a.ids", "a.x"]
        one, other = tensors["a.x"], tensors["a.x"]
        assert one.dtype is torch.bfloat16
        one.zero_()
        assert torch.equal(other.float(), torch.arange(6.0).view(2, 3))
        with pytest.raises(KeyError):
            tensors["b.y"]
    with open_tensors([file], "", dtype=None) as tensors:
        assert tensors.nbytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("stored", "requested", "found"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.int64, torch.bfloat16, torch.int64),
    ],
)
def test_a_tensor_may_stay_as_it_is_stored(
    tmp_path: Path, stored: torch.dtype, requested: torch.dtype | None, found: torch.dtype
) -> None:
    """Unless that would be larger than what is requested."""
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.arange(4).to(stored)}, path)
    with open_tensors([path], "", dtype=requested) as tensors:
        assert tensors.as_stored("x").dtype == found


def test_rows_are_read_from_the_file_when_they_are_looked_up(tmp_path: Path) -> None:
    """In any order and as often as wanted, even when the file was deleted."""
    path = tmp_path / "model.safetensors"
    matrix = torch.arange(12.0).view(4, 3).bfloat16()
    save_file({"before": torch.ones(5), "x": matrix}, path)
    with open_tensors([path], "", dtype=torch.float32) as tensors:
        rows = tensors.rows("x")
    path.unlink()
    assert torch.equal(rows[[3, 0, 3]], matrix[[3, 0, 3]])
    assert rows[[]].shape == (0, 3)
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match="has 4 of these rows"):
            rows[[0, wrong]]


def test_a_matrix_is_read_in_parts(tmp_path: Path) -> None:
    """In the dtype of the file, each part over the one before it; a file that ends too soon is named."""
    path = tmp_path / "model.safetensors"
    matrix = torch.arange(30.0).view(10, 3).bfloat16()
    save_file({"before": torch.ones(5), "x": matrix}, path)
    with open_tensors([path], "", dtype=torch.float32) as tensors:
        rows = tensors.rows("x")
        assert rows.shape == (10, 3)
        parts = [(part.data_ptr(), part.clone()) for part in rows.split(4)]
        assert len({place for place, _ in parts}) == 1
        assert [len(part) for _, part in parts] == [4, 4, 2]
        assert torch.equal(torch.cat([part for _, part in parts]), matrix)
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(JobError, match=r"model\.safetensors: was cut short"):
            list(rows.split(4))


@pytest.mark.parametrize("change", [lambda raw: raw[:-4], lambda raw: raw[:-4] + b"\xff" * 4])
def test_rows_of_a_file_that_was_written_to_are_refused(file: Path, change: Any) -> None:
    """A model must not speak with the weights of another one."""
    with open_tensors([file], "", dtype=None) as tensors:
        rows = tensors.rows("a.x")
    os.utime(file, ns=(0, 0))
    with open_tensors([file], "", dtype=None) as tensors:
        unchanged = tensors.rows("a.x")
    assert torch.equal(unchanged[[1]], torch.tensor([[3.0, 4.0, 5.0]]))
    file.write_bytes(change(file.read_bytes()))
    for found in (rows, unchanged):
        with pytest.raises(RuntimeError, match=r"model\.safetensors was changed while its model is in use"):
            found[[1]]


def test_shards_are_found_through_their_index(file: Path, tmp_path: Path) -> None:
    """All shards that the index names are read, and the error names a missing one."""
    file.rename(tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {"a.x": shards[0], "a.ids": shards[0], "b.y": shards[0], "c": shards[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert set(read_headers(find_tensor_files(tmp_path))) == set(weight_map)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(JobError, match=r"model-00002-of-00002\.safetensors: missing"):
        read_headers(find_tensor_files(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"has \d+ bytes where its header says \d+"),
        (lambda raw: raw + b"\0", r"has \d+ bytes where its header says \d+"),
        (lambda raw: raw[:20], "is not a safetensors file"),
        (lambda _: b"", "is not a safetensors file"),
        (lambda _: b"<!DOCTYPE html><html></html>", "is not a safetensors file"),
        (lambda raw: raw[:8] + b"x" + raw[9:], "header is damaged"),
        (lambda raw: raw.replace(b'"shape":[5]', b'"shape":[6]'), "damaged header at b.y"),
        (lambda raw: raw.replace(b'"dtype":"F32"', b'"dtype":"Q32"'), "damaged header"),
    ],
)
def test_damage_is_detected_without_loading(file: Path, damage: object, message: str) -> None:
    """The error names the file that was cut, extended or overwritten."""
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator] # each is a function of bytes

    with pytest.raises(JobError, match=rf"model\.safetensors: .*{message}") as caught:
        read_headers([file])
    assert caught.value.code == "model_unavailable"


def test_missing_and_misshapen_tensors_are_named(file: Path) -> None:
    """`require_tensors` compares shapes; -1 in an expected shape allows any size."""
    headers = read_headers([file])
    require_tensors(headers, {"a.x": (2, -1), "b.y": (5,)}, file)

    with pytest.raises(JobError, match=r"has no tensor a\.z"):
        require_tensors(headers, {"a.z": (1,)}, file)
    with pytest.raises(JobError, match=r"a\.x is \[2, 3\], but config\.json makes it \[3, 3\]"):
        require_tensors(headers, {"a.x": (3, 3)}, file)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    """A file may be deleted between verification and loading."""
    with pytest.raises(JobError, match=r"gone\.safetensors: missing"):
        load_tensors([tmp_path / "gone.safetensors"], "", dtype=None)


def test_a_file_that_is_cut_while_open_is_named(file: Path) -> None:
    """A file may be cut after its header was read: reading a tensor is then an error, not the end of the process."""
    with open_tensors([file], "", dtype=None) as tensors:
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(JobError, match=r"model\.safetensors: was cut short") as caught:
            dict(tensors)
    assert caught.value.code == "model_unavailable"


def test_tensors_do_not_depend_on_their_file(file: Path) -> None:
    """Loaded tensors keep their values when the file is overwritten in place."""
    tensors = load_tensors([file], "", dtype=None)
    size = file.stat().st_size
    with file.open("r+b") as overwritten:
        overwritten.write(b"\xff" * size)
    assert torch.equal(tensors["a.x"], torch.arange(6.0).view(2, 3))
    assert torch.equal(tensors["b.y"], torch.ones(5))


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    ],
    ids=str,
)
def test_every_dtype_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    """Scalars, empty tensors and others, in each dtype of published checkpoints."""
    written = {
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.zeros((0, 3), dtype=dtype),
        "others": torch.arange(30).view(2, 3, 5).to(dtype),
    }
    save_file(written, tmp_path / "model.safetensors")
    read = load_tensors([tmp_path / "model.safetensors"], "", dtype=None)
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype is dtype
        assert torch.equal(read[name], tensor)
