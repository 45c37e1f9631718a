"""Products x Wᵀ: the kernels, each with its layout of W. `Linear` of the model stands in front of them.

Owns the layouts and what is known of each kernel's bits. products_trial.py chooses among them by time.
On CUDA there is one kernel, Plain.
"""

import contextlib
import functools
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

PACK_ELEMENTS: Final = 1 << 18
"""On CPU, weights of at least this many elements are kept in a layout of their own ("packed").

Measured on 2 cores of an AMD EPYC (Zen 4), float32: from here up oneDNN's is 2 to 3 times faster than MKL at 1 to 16
rows. Below, its overhead costs more: 13 µs a call in a loop of nothing else, 40 µs between the operators of a frame.
"""

BATCH_MULTIPLE: Final = 4
"""On CPU, batches are padded to a multiple of this, unless every kernel of the model was seen to need no padding.

MKL computes 1 to 3 trailing rows with other kernels, whose sums round differently.
With full groups of 4, products are batch invariant: a row's bits do not depend on the batch it is in.
Which layout of W this takes depends on the processor; see `_invariant_layout`.
"""

_TRIAL_SHAPES: Final = ((128, 64), (192, 64), (256, 128))
"""Inputs and outputs of products whose sums, on an Intel Xeon with AVX-512, depend on the batch from 5 or 9 rows up."""

_LARGEST_GROUP: Final = 14
"""The most rows that fbgemm multiplies by a float16 weight at once: with AVX-512."""

_ROWS_AT_ONCE: Final = 128
_SMALLEST: Final = 1e-30
_BELOW_LEVELS: Final = 1.0001
"""A step is larger by this, so that rounding brings no value of a row above `levels`."""
_TOLERANCE: Final = 0.02


class Rows(Protocol):
    """A matrix that can be read in parts, perhaps from a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Outputs and inputs."""

    def split(self, rows: int, /) -> Iterable[Tensor]:
        """Parts of so many rows, in order. Each is read before the next one is asked for."""


class Kernel(Protocol):
    """One W, and the product with it.

    `tensors`: all that it computes with. `hidden_bytes`: what of them is in memory that torch does not count.
    """

    tensors: list[Tensor]
    hidden_bytes: int

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` [rows, out] + x Wᵀ, in a new tensor. For a kernel without bias."""


class Plain:
    """A matrix for torch's own product: on CUDA by cuBLAS, on CPU by MKL."""

    hidden_bytes = 0

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._transposed = weight.t()
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and _invariant_layout() != "view":
            self._transposed = self._transposed.contiguous()
        self._bias = bias
        self.tensors = [self._transposed, *_given(bias)]

    def __call__(self, x: Tensor) -> Tensor:
        if self._bias is not None:
            return torch.addmm(self._bias, x, self._transposed)
        return torch.mm(x, self._transposed)  # what functional.linear calls in the end, in a third of the calls

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Only float32 adds within the product, which rounds once less than a sum."""
        return torch.addmm(y, x, self._transposed) if x.dtype == torch.float32 else y + self(x)


class Packed:
    """oneDNN's blocked layout, float32 or bfloat16."""

    hidden_bytes = 0  # packed tensors know their size

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._outputs = weight.shape[0]
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # noqa: SLF001 -- no public way to keep a packed weight with plain tensors around it
        self.tensors = [self._weight, *_given(bias)]

    def __call__(self, x: Tensor) -> Tensor:
        return self.add_to(x.new_zeros(x.shape[0], self._outputs), x)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The form of oneDNN's product that can be traced (see cpu_traces.py). Adding costs nothing in float32."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, y, self._weight, self._bias, "add")  # noqa: SLF001 -- as above


class _Half:
    """fbgemm: float16 weights, everything else in float32. A row's bits do not depend on the batch.

    Weights that came from bfloat16 keep every bit down to 2e-5; smaller ones are off by 3e-8 at most.
    """

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        extra = _equal_rows(rows) - rows
        return self.multiply(functional.pad(x, (0, 0, 0, extra)))[:rows] if extra else self.multiply(x)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        return self(x).add_(y)

    def multiply(self, x: Tensor) -> Tensor:
        """The product as fbgemm computes it."""
        raise NotImplementedError


class Half(_Half):
    """On one thread."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = torch.fbgemm_pack_gemm_matrix_fp16(weight.float())
        self.hidden_bytes = 2 * weight.numel()
        self.tensors = [self._packed, *_given(bias)]

    def multiply(self, x: Tensor) -> Tensor:
        return torch.fbgemm_linear_fp16_weight_fp32_activation(x, self._packed, self._bias)


class HalfThreaded(_Half):
    """The same bits on all threads. Each call costs 20 µs more, so small products are slower."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        key = next(_keys)
        _objects[key] = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        weakref.finalize(self, _objects.pop, key)
        self._key = torch.tensor(key)  # a trace can be called with another tensor, but not with another number
        self.hidden_bytes = 2 * weight.numel()
        self.tensors = [self._key]

    def multiply(self, x: Tensor) -> Tensor:
        return _linear_of_object(x, self._key)


_objects: dict[int, Any] = {}
"""Results of `quantized.linear_prepack_fp16`, by number: a trace takes tensors, but no such objects."""

_keys = itertools.count()
_library = torch.library.Library("qwen3_tts_server", "DEF")
_library.define("linear_of_object(Tensor x, Tensor key) -> Tensor")
_library.impl(
    "linear_of_object", lambda x, key: torch.ops.quantized.linear_dynamic_fp16.default(x, _objects[int(key)]), "CPU"
)
_linear_of_object = torch.ops.qwen3_tts_server.linear_of_object.default


class _Rowwise:
    """int8 weights with a scale for each output, and int8 activations with a scale for each row.

    Sums of integers are exact, and a row's scale is its own maximum: its bits cannot depend on the batch.
    """

    tensors: list[Tensor]
    hidden_bytes = 0
    levels = 127
    """The largest integer of an activation."""

    def __init__(
        self, weight: Rows | Sequence[Rows], bias: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        """`weight` may have fewer bits than float32, and may be matrices whose outputs follow each other.

        `columns`: by what each of its columns is multiplied first.
        """
        matrices = weight if isinstance(weight, Sequence) else [weight]
        shape = sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1]
        self._added = bias
        self._smallest = torch.tensor(_SMALLEST)  # an operator would convert a number in three more: 1.4 µs
        self._scale, self._sums = torch.empty(shape[0]), torch.empty(shape[0])
        self._quantized = torch.empty(shape, dtype=torch.int8)
        rows = torch.empty(_ROWS_AT_ONCE, shape[1])
        # In parts that stay in the cache: 8 passes over the memory of a whole matrix would take twice as long.
        # For so few rows, several threads take twice the CPU time of one.
        with one_thread():
            begin = 0
            for part in itertools.chain.from_iterable(matrix.split(_ROWS_AT_ONCE) for matrix in matrices):
                end = begin + len(part)
                integers = rows[: len(part)].copy_(part)
                if columns is not None:
                    integers.mul_(columns)
                scale = self._scale[begin:end]
                torch.div(integers.abs().amax(1).clamp_(min=_SMALLEST), 127, out=scale)
                self._quantized[begin:end] = integers.div_(scale[:, None]).round_()
                torch.sum(integers, 1, out=self._sums[begin:end])
                begin = end

    def __call__(self, x: Tensor) -> Tensor:
        if self._added is not None:
            return self.add_to(self._added, x)
        step = self.step(x)
        return self.multiply(x / step).mul_(step)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        step = self.step(x)
        return torch.addcmul(y, self.multiply(x / step), step)

    def step(self, x: Tensor) -> Tensor:
        """The value of the integer 1 in each row of `x`, [rows, 1]; never 0."""
        # A third of the time of vector_norm.
        return torch.add(self._smallest, x.abs().amax(1, keepdim=True), alpha=_BELOW_LEVELS / self.levels)

    def multiply(self, *parts: Tensor) -> Tensor:
        """The product with the rows of all parts, whose values up to `levels` are rounded to integers."""
        raise NotImplementedError


class Int8(_Rowwise):
    """fbgemm. It chooses one scale for all rows from their least and greatest value.

    So integers begin at 0, and the first column is always 255. What that column would give is added in float32.
    A row with both values would take as long as another row: a quarter of a row's time, where weights come from memory.
    """

    def __init__(
        self, weight: Rows | Sequence[Rows], bias: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        super().__init__(weight, bias, columns)
        quantized = self._quantized
        del self._quantized
        self.levels = _levels()
        self._first_column = quantized[:, 0].float()
        quantized[:, 0] = 0
        self._packed = torch.fbgemm_pack_quantized_matrix(quantized)
        self._sums = (self._sums - self._first_column).to(torch.int32)
        # fbgemm reads only the shape of this one.
        self._shape = torch.zeros(1, 1, dtype=torch.int8).expand(quantized.shape)
        self._levels = torch.tensor(float(self.levels))
        self._shift = self._sums * -self._levels
        self.hidden_bytes = quantized.numel()
        self.tensors = [self._scale, self._packed, self._sums, self._shape, self._shift, self._first_column]
        self.tensors += _given(bias)

    def multiply(self, *parts: Tensor) -> Tensor:
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        shifted = rows + self._levels
        shifted.select(1, 0).fill_(255)
        product = torch.fbgemm_linear_int8_weight_fp32_activation(
            shifted, self._shape, self._packed, self._sums, 1.0, 0, self._shift
        )
        return product.addcmul_(rows.narrow(1, 0, 1), self._first_column).mul_(self._scale)


class Int8Portable(_Rowwise):
    """torch's product of integers: for a torch or a processor without the others."""

    def __init__(
        self, weight: Rows | Sequence[Rows], bias: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        super().__init__(weight, bias, columns)
        self._quantized = self._quantized.t().contiguous()
        self.tensors = [self._scale, self._quantized, *_given(bias)]

    def multiply(self, *parts: Tensor) -> Tensor:
        integers = torch.cat(parts).round_().to(torch.int8)
        return torch._int_mm(integers, self._quantized).float().mul_(self._scale)  # noqa: SLF001 -- the only product of integers


class WideActivations:
    """int8 weights, and activations of 15 bits and a sign: what int8 rounds away is multiplied as further rows.

    An activation may be a hundred times as large as its row's others, as those in front of `down` are: int8 would round
    these to nothing. Twice the rows cost a tenth of the time, since reading the weights takes most of it.
    """

    def __init__(self, kernel: Callable[..., _Rowwise], weight: Rows, bias: Tensor | None = None) -> None:
        self._kernel = kernel(weight)
        self._bias = bias
        self.hidden_bytes = self._kernel.hidden_bytes
        self.tensors = [*self._kernel.tensors, *_given(bias)]

    def __call__(self, x: Tensor) -> Tensor:
        if self._bias is not None:
            return self.add_to(self._bias, x)
        step = self._kernel.step(x)
        return self._multiply(x / step).mul_(step)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        step = self._kernel.step(x)
        return torch.addcmul(y, self._multiply(x / step), step)

    def _multiply(self, x: Tensor) -> Tensor:
        """The product with rows of values up to `levels`."""
        rounded, finer = x.round(), 2 * self._kernel.levels
        product = self._kernel.multiply(rounded, torch.sub(x, rounded).mul_(finer))
        high, low = product.split_with_sizes((x.shape[0], x.shape[0]))
        return torch.add(high, low, alpha=1 / finer)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def half_if_large(weight: Tensor, bias: Tensor | None = None) -> Kernel:
    """float16 weights in a matrix of published size, where this machine has such products; else those by size."""
    half = weight.numel() >= PACK_ELEMENTS and available("fp16_threaded")
    return KERNELS["fp16_threaded" if half else by_size(weight)](weight, bias)


WIDE: Final = "_wide"
"""The end of the name of an int8 kernel with wide activations."""

_INT8: Final[dict[str, Callable[..., _Rowwise]]] = {"int8": Int8, "int8_portable": Int8Portable}

KERNELS: Final[dict[str, Callable[..., Kernel]]] = {
    "plain": Plain,
    "packed": Packed,
    "fp16": Half,
    "fp16_threaded": HalfThreaded,
    "fp16_if_large": half_if_large,
    **_INT8,
    **{f"{name}{WIDE}": functools.partial(WideActivations, kernel) for name, kernel in _INT8.items()},
}
"""The kernels by name; each is made of a weight [out, in] and a bias [out] or None."""


def reads_in_parts(name: str) -> bool:
    """True if this kernel reads a matrix of any dtype in parts, so that it is never whole in memory as float32."""
    return name.removesuffix(WIDE) in _INT8


def by_size(weight: Tensor) -> str:
    """The kernel for `weight` if no trial was made.

    "packed" for large ones on a CPU, and for all of them where MKL's products depend on the batch.
    """
    if weight.device.type != "cpu" or not packs(weight.dtype):
        return "plain"
    large = weight.numel() >= PACK_ELEMENTS
    return "packed" if large or not plain_is_batch_invariant(weight.dtype) else "plain"


def plain_is_batch_invariant(dtype: torch.dtype) -> bool:
    """True if on this CPU a row of a plain product depends on its group of BATCH_MULTIPLE alone; known of float32."""
    return dtype != torch.float32 or _invariant_layout() is not None


def packs(dtype: torch.dtype) -> bool:
    """True if oneDNN packs weights of this dtype on this processor: of bfloat16 not without AVX-512."""
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 -- no public way


@functools.cache
def available(name: str) -> bool:
    """True if a quantised kernel works here. Some are deprecated, and some need fbgemm, which is for x86."""
    weight, x = (torch.sin(torch.arange(rows * 64).float()).view(rows, 64) for rows in (32, 3))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says once that they will be removed; then this says that they are
            product = KERNELS[name](weight)(x)
    except (AttributeError, RuntimeError):
        return False
    wanted = x @ weight.t()
    return bool((product - wanted).norm() <= _TOLERANCE * wanted.norm())


@functools.cache
def _equal_rows(rows: int) -> int:
    """The fewest rows from `rows` on of which fbgemm's float16 product gives each the bits of a full group.

    Without AVX-512 a group has 6 rows, and what is left over for a group of 1 or 2 rows is summed in another order.
    """
    weight, one = _half_trial()
    full = weight.multiply(one.expand(BATCH_MULTIPLE, -1).contiguous())[:1]
    for count in range(rows, rows + _LARGEST_GROUP):
        product = weight.multiply(one.expand(count, -1).contiguous())
        if torch.equal(product, full.expand_as(product)):
            return count
    return rows


@functools.cache
def _half_trial() -> tuple[Half, Tensor]:
    """A float16 weight [64, 256], and a row for it."""
    generator = torch.Generator().manual_seed(0)
    return Half(torch.randn(64, 256, generator=generator)), torch.randn(1, 256, generator=generator)


@functools.cache
def _levels() -> int:
    """The largest integer of an activation that fbgemm multiplies right: 127, or 63 without VNNI.

    There it adds pairs of products in 16 bits, and two large ones do not fit.
    """
    integers = torch.full((16, 64), 127, dtype=torch.int8)
    packed, sums = torch.fbgemm_pack_quantized_matrix(integers), integers.sum(1, dtype=torch.int32)
    x = torch.ones(1, 64)
    x[0, 0] = -1.0
    product = torch.fbgemm_linear_int8_weight_fp32_activation(x, integers, packed, sums, 1.0, 0, torch.zeros(16))
    return 127 if float((product - 62 * 127).abs().max()) < 127 else 63  # noqa: PLR2004 -- one step


def _given(bias: Tensor | None) -> list[Tensor]:
    return [] if bias is None else [bias]


@functools.cache
def _invariant_layout() -> Literal["view", "contiguous"] | None:
    """The layout of Wᵀ with which MKL's float32 products x Wᵀ of full groups are batch invariant on this processor.

    As a view of W on an AMD EPYC (Zen 4). Contiguous, which is as fast, on an Intel Xeon with AVX-512. Neither helps on
    an Intel with AVX2 alone, whose groups have 6 rows, and whose larger batches are computed in another way.
    One trial for the process; it takes milliseconds.
    """
    return "view" if _is_batch_invariant("view") else "contiguous" if _is_batch_invariant("contiguous") else None


def _is_batch_invariant(layout: Literal["view", "contiguous"]) -> bool:
    generator = torch.Generator().manual_seed(0)
    for inner, outer in _TRIAL_SHAPES:
        weight, x = (torch.randn(rows, inner, generator=generator) for rows in (outer, 8 * BATCH_MULTIPLE))
        transposed = weight.t() if layout == "view" else weight.t().contiguous()
        alone = torch.cat([torch.mm(group, transposed) for group in x.split(BATCH_MULTIPLE)])
        for rows in range(2 * BATCH_MULTIPLE, len(x) + 1, BATCH_MULTIPLE):
            if not torch.equal(torch.mm(x[:rows], transposed), alone[:rows]):
                return False
    return True
