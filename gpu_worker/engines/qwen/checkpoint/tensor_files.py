"""safetensors files: their headers, whether they are whole, and their tensors.

This module never unpickles anything. It knows neither models nor the layout of a checkpoint.

Tensors are read into memory of their own, not mapped. If a mapped file were overwritten or cut, a model would change
while it speaks, or the process would die. (The reader of the safetensors library maps; it also loses 64 bytes a tensor,
5 KiB a load, measured with 0.8.0.) StoredRows reads rows when they are looked up, and refuses a file that was changed.
"""

import contextlib
import hashlib
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from gpu_worker.engines.qwen.checkpoint.json_files import read_json, unavailable

if TYPE_CHECKING:  # importing torch takes seconds, and looking for a checkpoint must not
    import torch
    from torch import Tensor

_DTYPES: Final = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""The dtypes of checkpoints: torch's name, and bytes of a value."""

_MAX_HEADER_BYTES: Final = 100_000_000
"""The limit of the safetensors format."""

_FINGERPRINT_BYTES: Final = 1024
"""Bytes of each tensor that a fingerprint covers."""


class TensorInfo(msgspec.Struct, frozen=True):
    """The header's entry of one tensor. `data_offsets` (begin, end) count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    def nbytes(self, floats_as: "torch.dtype | None" = None) -> int:
        """Bytes of the tensor, with floating-point values converted to `floats_as`. KeyError for an unknown dtype."""
        name, width = _DTYPES[self.dtype]
        return math.prod(self.shape) * (floats_as.itemsize if floats_as and "float" in name else width)


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def find_tensor_files(directory: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of `directory`: `<stem>.safetensors`, or else the shards that its index names.

    Raises:
        JobError: `model_unavailable`: there is neither, or the index cannot be read.
    """
    single = directory / f"{stem}.safetensors"
    index = directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise unavailable(single, "missing")
    return [directory / name for name in sorted(set(read_json(index, _Index).weight_map.values()))]


def read_headers(files: list[Path]) -> dict[str, TensorInfo]:
    """The header entries of all files, by tensor name. Checks that every file has the length that its header implies.

    Raises:
        JobError: `model_unavailable`, naming the file that is missing, damaged or of the wrong length.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        tensors |= _read_header(path)[0]
    return tensors


def require_tensors(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Check that every expected tensor exists in its expected shape. -1 in an expected shape allows any size.

    Raises:
        JobError: `model_unavailable`, naming `where` and the tensor.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise unavailable(where, f"has no tensor {name}")
        found = tensors[name].shape
        if len(found) != len(shape) or any(want not in (-1, have) for want, have in zip(shape, found, strict=True)):
            raise unavailable(where, f"{name} is {list(found)}, but config.json makes it {list(shape)}")


def load_tensors(
    files: list[Path], prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> "dict[str, Tensor]":
    """Every tensor whose name begins with `prefix`, by its full name, on `device`.

    Floating-point tensors are converted to `dtype`; None keeps the dtype of the file.

    Raises:
        JobError: `model_unavailable`, naming the file that is missing or cannot be read.
    """
    with open_tensors(files, prefix, dtype=dtype, device=device) as tensors:
        return dict(tensors)


@contextlib.contextmanager
def open_tensors(
    files: list[Path], prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> "Iterator[LazyTensors]":
    """As `load_tensors`, but a tensor is read when it is looked up. The files are open within the context."""
    with contextlib.ExitStack() as stack:
        places: dict[str, _Place] = {}
        for path in files:
            tensors, data_start = _read_header(path)
            try:
                file = stack.enter_context(path.open("rb"))
            except OSError as error:
                raise unavailable(path, f"cannot be read: {error.strerror}") from error
            names = (name for name in tensors if name.startswith(prefix))
            places |= {name: _Place(path, file, data_start, tensors[name]) for name in names}
        yield LazyTensors(places, dtype=dtype, device=device)


class LazyTensors(Mapping[str, "Tensor"]):
    """The tensors of open files by name. Each lookup reads the tensor anew, so a model is never whole in memory twice.

    A lookup raises as `load_tensors` does, and KeyError for an unknown name.
    """

    def __init__(
        self, places: "Mapping[str, _Place]", *, dtype: "torch.dtype | None", device: "torch.device | str"
    ) -> None:
        self._places = places
        self._dtype = dtype
        self._device = device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together, after their conversion."""
        return sum(place.info.nbytes(self._dtype) for place in self._places.values())

    def __getitem__(self, name: str) -> "Tensor":
        tensor = self._read(name)
        return tensor.to(device=self._device, dtype=self._dtype if tensor.is_floating_point() else None)

    def as_stored(self, name: str) -> "Tensor":
        """The tensor in the dtype of its file, or in that of a lookup if that one is smaller."""
        tensor = self._read(name)
        smaller = self._dtype is not None and self._dtype.itemsize < tensor.dtype.itemsize
        return tensor.to(device=self._device, dtype=self._dtype if smaller and tensor.is_floating_point() else None)

    def rows(self, name: str) -> "StoredRows":
        """The rows of a matrix, which stay in the file. They can be read when the file is not open here any more."""
        return StoredRows(self._places[name])

    def _read(self, name: str) -> "Tensor":
        place = self._places[name]
        try:
            place.file.seek(place.data_start + place.info.data_offsets[0])
            return _read_tensor(place.file, place.info)
        except OSError as error:
            raise unavailable(place.path, f"cannot be read: {error.strerror}") from error
        except EOFError as error:
            raise unavailable(place.path, "was cut short while it was read") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class StoredRows:
    """A matrix [rows, values] that stays in its file. A lookup reads the rows that it names, 1 µs each if the system
    has them in its cache. `split` reads all of them once.

    This holds the file open, so it may be deleted, or replaced by another one.
    """

    def __init__(self, place: "_Place") -> None:
        self._place = place
        self._file = os.dup(place.file.fileno())
        weakref.finalize(self, os.close, self._file)
        self._stamp = self._read_stamp()

    def __getitem__(self, numbers: Sequence[int]) -> "Tensor":
        """The rows of these numbers, [numbers, values], in the dtype of the file.

        Raises:
            IndexError: there is no such row.
            RuntimeError: the file was written to after it was opened. The model must be loaded again.
            OSError: the file cannot be read any more.
        """
        import torch  # noqa: PLC0415 -- as in _read_tensor

        info, (count, values) = self._place.info, self._place.info.shape
        size = info.nbytes() // count
        begin = self._place.data_start + info.data_offsets[0]
        if not all(0 <= number < count for number in numbers):
            raise IndexError(f"{self._place.path} has {count} of these rows, and not all of {list(numbers)}")
        data = bytearray().join(os.pread(self._file, size, begin + number * size) for number in numbers)
        if len(data) != len(numbers) * size or self._read_stamp() != self._stamp:
            raise RuntimeError(f"{self._place.path} was changed while its model is in use")
        dtype = getattr(torch, _DTYPES[info.dtype][0])
        return torch.frombuffer(data, dtype=dtype).view(-1, values) if data else torch.empty(0, values, dtype=dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and values."""
        return self._place.info.shape

    def split(self, count: int) -> "Iterator[Tensor]":
        """All rows in order, `count` at a time, in the dtype of the file. Each part is read over the one before it.

        So the parts stay in the processor's cache, and no matrix is written to memory that the system must clear first.

        Raises:
            JobError: `model_unavailable`: the file cannot be read, or was changed meanwhile.
        """
        import torch  # noqa: PLC0415 -- as in _read_tensor

        info, (rows, values) = self._place.info, self._place.info.shape
        part = torch.empty(min(count, rows), values, dtype=getattr(torch, _DTYPES[info.dtype][0]))
        offset = self._place.data_start + info.data_offsets[0]
        for begin in range(0, rows, count):
            read = part[: rows - begin]
            try:
                size = os.preadv(self._file, [read.view(torch.uint8).numpy().data], offset)
            except OSError as error:
                raise unavailable(self._place.path, f"cannot be read: {error.strerror}") from error
            if size != read.nbytes:
                raise unavailable(self._place.path, "was cut short while it was read")
            offset += size
            yield read
        if self._read_stamp() != self._stamp:
            raise unavailable(self._place.path, "was changed while it was read")

    def _read_stamp(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns


def fingerprint(files: list[Path]) -> bytes:
    """A digest of the names, shapes and first 1024 bytes of all tensors. Reading all bytes would take seconds.

    The first bytes are enough: training changes all of a tensor or nothing of it.

    Raises:
        JobError: `model_unavailable`, naming the file that is missing, damaged or cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        tensors, data_start = _read_header(path)
        try:
            with path.open("rb") as file:
                for name, info in tensors.items():
                    start, end = info.data_offsets
                    file.seek(data_start + start)
                    digest.update(msgspec.msgpack.encode((name, info)))
                    digest.update(file.read(min(end - start, _FINGERPRINT_BYTES)))
        except OSError as error:
            raise unavailable(path, f"cannot be read: {error.strerror}") from error
    return digest.digest()


class _Place(NamedTuple):
    """Where a tensor is. `data_start`: the offset in the file from which `info.data_offsets` count."""

    path: Path
    file: BufferedReader
    data_start: int
    info: TensorInfo


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """The header's entries by tensor name, and the offset of the first byte behind the header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise unavailable(path, "is not a safetensors file")
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
    except FileNotFoundError as error:
        raise unavailable(path, "missing") from error
    except OSError as error:
        raise unavailable(path, f"cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unavailable(path, "is not a safetensors file: its header is damaged") from error
    raw.pop("__metadata__", None)
    try:
        tensors = {name: msgspec.json.decode(info, type=TensorInfo) for name, info in raw.items()}
    except msgspec.DecodeError as error:
        raise unavailable(path, f"has a damaged header: {error}") from error
    for name, info in tensors.items():
        start, end = info.data_offsets
        if info.dtype not in _DTYPES or end - start != info.nbytes():
            raise unavailable(path, f"has a damaged header at {name}")
    expected = 8 + length + max((info.data_offsets[1] for info in tensors.values()), default=0)
    if size != expected:
        raise unavailable(path, f"has {size} bytes where its header says {expected}")
    return tensors, 8 + length


def _read_tensor(file: BufferedReader, info: TensorInfo) -> "Tensor":
    """The tensor at the current offset of `file`. Raises EOFError if the file ends within the tensor."""
    import torch  # noqa: PLC0415 -- importing torch takes seconds, and looking for a checkpoint must not

    tensor = torch.empty(info.shape, dtype=getattr(torch, _DTYPES[info.dtype][0]))
    if tensor.numel() and file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
        raise EOFError
    return tensor
