"""safetensors files: whether they are whole, what is in them, and their tensors on a device.

It never unpickles anything, and knows neither of models nor of where checkpoints lie.

Tensors are read, not mapped: who overwrote or cut a mapped file would change a model that speaks or kill the process.
(safetensors' own reader maps, and loses 64 bytes a tensor: 5 KiB a load, measured with 0.8.0.)
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from gpu_worker.engines.base import JobError

if TYPE_CHECKING:  # finding a checkpoint must not cost the seconds that importing torch takes
    import torch
    from torch import Tensor

_DTYPE_BYTES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_TORCH_NAMES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_HEADER_BYTES: Final = 100_000_000
"""The limit of the safetensors format itself."""

_SAMPLE_BYTES: Final = 1024


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor as a safetensors header describes it; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def unavailable(path: Path, problem: str) -> JobError:
    """The error for a file that keeps a model from being loaded."""
    return JobError("model_unavailable", f"{path}: {problem}")


def tensor_files(directory: Path, stem: str = "model") -> list[Path]:
    """The safetensors files of `directory`: `<stem>.safetensors`, or the shards that its index names.

    Raises:
        JobError: `model_unavailable` when there are neither, or when the index cannot be read.
    """
    single = directory / f"{stem}.safetensors"
    index = directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise unavailable(single, "missing")
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.DecodeError) as error:
        raise unavailable(index, f"cannot be read: {error}") from error
    return [directory / name for name in sorted(set(weight_map.values()))]


def read_headers(files: list[Path]) -> dict[str, TensorInfo]:
    """What the files hold, by tensor name, after checking that none of them is cut short.

    Raises:
        JobError: `model_unavailable` naming the file that is missing, damaged or of the wrong length.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        tensors |= _read_header(path)[0]
    return tensors


def require(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Check that every expected tensor is there in its shape; -1 in a shape stands for any size.

    Raises:
        JobError: `model_unavailable` naming `where` and the tensor.
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
    """Every tensor whose name begins with `prefix`, under its full name, on `device`.

    Floating-point tensors come in `dtype` (None keeps the file's).

    Raises:
        JobError: `model_unavailable` naming a file that vanished or cannot be read.
    """
    with open_tensors(files, prefix, dtype=dtype, device=device) as tensors:
        return dict(tensors)


@contextlib.contextmanager
def open_tensors(
    files: list[Path], prefix: str, *, dtype: "torch.dtype | None", device: "torch.device | str" = "cpu"
) -> "Iterator[Stored]":
    """As `load_tensors`, to be read one by one while the files are open."""
    with contextlib.ExitStack() as stack:
        places: dict[str, _Place] = {}
        for path in files:
            tensors, begin = _read_header(path)
            try:
                file = stack.enter_context(path.open("rb"))
            except OSError as error:
                raise unavailable(path, f"cannot be read: {error.strerror}") from error
            names = (name for name in tensors if name.startswith(prefix))
            places |= {name: _Place(path, file, begin, tensors[name]) for name in names}
        yield Stored(places, dtype=dtype, device=device)


class Stored(Mapping[str, "Tensor"]):
    """Tensors of open files by name, each read when it is asked for: a model never lies in RAM as a whole.

    Looking one up raises as `load_tensors` does; KeyError where there is none of that name.
    """

    def __init__(
        self, places: "Mapping[str, _Place]", *, dtype: "torch.dtype | None", device: "torch.device | str"
    ) -> None:
        self._places = places
        self._dtype = dtype
        self._device = device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, in the dtype that they come in."""
        return sum(
            math.prod(place.info.shape)
            * (self._dtype.itemsize if self._dtype and place.info.dtype in _FLOATS else _DTYPE_BYTES[place.info.dtype])
            for place in self._places.values()
        )

    def __getitem__(self, name: str) -> "Tensor":
        place = self._places[name]
        try:
            place.file.seek(place.begin + place.info.data_offsets[0])
            tensor = _read_tensor(place.file, place.info)
        except OSError as error:
            raise unavailable(place.path, f"cannot be read: {error.strerror}") from error
        except EOFError as error:
            raise unavailable(place.path, "was cut short while it was read") from error
        return tensor.to(device=self._device, dtype=self._dtype if tensor.is_floating_point() else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def fingerprint(files: list[Path]) -> bytes:
    """A digest of the names, shapes and first values of all tensors: 1 KiB of each, where reading all takes seconds.

    Training changes the whole of a tensor or nothing of it.

    Raises:
        JobError: `model_unavailable` naming a file that is missing, damaged or cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        tensors, begin = _read_header(path)
        try:
            with path.open("rb") as file:
                for name, info in tensors.items():
                    start, end = info.data_offsets
                    file.seek(begin + start)
                    digest.update(msgspec.msgpack.encode((name, info)))
                    digest.update(file.read(min(end - start, _SAMPLE_BYTES)))
        except OSError as error:
            raise unavailable(path, f"cannot be read: {error.strerror}") from error
    return digest.digest()


class _Place(NamedTuple):
    """Where a tensor is; `begin` is where what the header describes begins in the file."""

    path: Path
    file: BufferedReader
    begin: int
    info: TensorInfo


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], int]:
    """What the header says, and where what it describes begins in the file."""
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
        if info.dtype not in _DTYPE_BYTES or end - start != math.prod(info.shape) * _DTYPE_BYTES[info.dtype]:
            raise unavailable(path, f"has a damaged header at {name}")
    expected = 8 + length + max((info.data_offsets[1] for info in tensors.values()), default=0)
    if size != expected:
        raise unavailable(path, f"has {size} bytes where its header says {expected}")
    return tensors, 8 + length


def _read_tensor(file: BufferedReader, info: TensorInfo) -> "Tensor":
    """The tensor that begins here; EOFError where the file ends before it does."""
    import torch  # noqa: PLC0415 -- finding a checkpoint must not cost the seconds that importing torch takes

    tensor = torch.empty(info.shape, dtype=getattr(torch, _TORCH_NAMES[info.dtype]))
    if tensor.numel() and file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
        raise EOFError
    return tensor
