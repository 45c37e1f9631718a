"""The choice of the kernels of a model's products: by a trial on this machine, whose outcome a file keeps.

The fastest kernel differs from processor to processor. So does whether a row's bits depend on its batch.
Owns the trial, the file, and what TTS_QUANTIZATION means for a CPU.
"""

import contextlib
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import structlog
import torch
from torch import Tensor

from gpu_worker.engines.qwen.runtime import products
from gpu_worker.engines.qwen.runtime.products import BATCH_MULTIPLE, KERNELS, PACK_ELEMENTS, WIDE

Quantization = Literal["auto", "none", "fp16", "int8", "fp8"]
Part = Literal["weights", "gate_up", "sensitive"]
"""The part of a model that a matrix belongs to: it chooses among the kernels of Products."""

Shapes = Sequence[tuple[int, int]]
"""Outputs and inputs of a model's products."""

MAX_KEPT: Final = 64
"""Outcomes that the file keeps: one for each processor, torch, number of threads, dtype and size of model."""

_ISA_VARIABLES: Final = (
    *("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"),
    *("FBGEMM_ENABLE_INSTRUCTIONS", "MKL_ENABLE_INSTRUCTIONS"),
)
"""With these the libraries of the products can be kept from instructions that the processor has."""

_MAX_FILE_BYTES: Final = 1 << 16
_COPIES: Final = 3
_ROUNDS: Final = 5
_MOST_ROUNDS: Final = 15
"""Rounds that time a kernel; the most, if other processes use the processor in the fastest of them."""

_QUIET: Final = 0.75
"""A round is quiet if its thread computed for this share of the time. It waits for the other threads of a product."""

_ROWS: Final = 8
_PROMPT_ROWS: Final = ((37, 9), (150, 53))
"""Rows of a product as prompts have them, and of their first parts."""
_CANDIDATES: Final = ("plain", "packed", "fp16", "fp16_threaded")

log = structlog.get_logger(__name__)


class Products(msgspec.Struct, frozen=True):
    """The kernels of one model. `weights` names that of most matrices, `sensitive` that of heads and `down`.

    "" chooses by the size of a matrix. Batches are padded to a multiple of `row_multiple`.
    `gate_up`: that of the matrices before the activation, if it is another one than `weights`.
    """

    weights: str = ""
    sensitive: str = ""
    row_multiple: int = BATCH_MULTIPLE
    gate_up: str = ""

    @property
    def quantization(self) -> Quantization:
        """The value of the setting that stands for these kernels."""
        kinds: tuple[Quantization, ...] = ("int8", "fp16", "fp8")
        return next((kind for kind in kinds if (self.gate_up or self.weights).startswith(kind)), "none")

    def of(self, part: Part) -> str:
        """The name of the kernel of a matrix; "" chooses by its size."""
        return self.sensitive if part == "sensitive" else (part == "gate_up" and self.gate_up) or self.weights

    @property
    def folds(self) -> bool:
        """True if a norm's weight may be multiplied into the matrices behind that norm; float16 would round them."""
        return self.quantization != "fp16"


PLAIN: Final = Products()
"""Nothing is quantised, and no trial is made."""


HALF: Final = Products(weights="fp16_if_large", sensitive="fp16_if_large")
"""Large matrices in float16."""


class Clocks(NamedTuple):
    """The seconds that pass, and those for which this thread computes."""

    wall: Callable[[], float] = time.perf_counter
    cpu: Callable[[], float] = time.thread_time


class Outcome(msgspec.Struct, frozen=True):
    """The outcome of a trial: the kernels, the fastest first, and the rows that each needs to be batch invariant.

    `quiet`: False if other processes used the processor in the fastest round of any kernel.
    """

    fastest: list[str]
    row_multiples: dict[str, int]
    quiet: bool = True


def choose(quantization: Quantization, shapes: Shapes, dtype: torch.dtype, kept_in: Path | None = None) -> Products:
    """The kernels for a model with products of these `shapes`. A trial is made if the file `kept_in` has no outcome.

    `quantization`: one that is not `unsupported`.
    """
    if not are_large(shapes):
        if quantization in ("fp16", "int8"):
            log.warning("quantization_left_out", reason="the matrices of this model are too small to gain from it")
        return PLAIN
    if quantization == "int8":
        weights = "int8" if products.available("int8") else "int8_portable"
        return Products(weights, weights + WIDE, row_multiple=1)
    outcome = _kept(shapes, dtype, kept_in)
    exact = next(name for name in outcome.fastest if name in ("plain", "packed"))
    half = next((name for name in outcome.fastest if name.startswith("fp16")), exact)
    chosen = {"auto": outcome.fastest[0], "fp16": half}.get(quantization, exact)
    return Products(chosen, chosen, outcome.row_multiples[chosen])


def are_large(shapes: Shapes) -> bool:
    """True if all products are large enough for layouts of their own, as those of published models are."""
    return min(outputs * inputs for outputs, inputs in shapes) >= PACK_ELEMENTS


def unsupported(quantization: Quantization, dtype: torch.dtype) -> str | None:
    """Why this CPU cannot use `quantization`, and what to do about it; None if it can."""
    if quantization in ("auto", "none"):
        return None
    setting = f"TTS_QUANTIZATION={quantization}"
    if dtype != torch.float32:
        return f"{setting} computes in float32; leave TTS_DTYPE at auto, or set TTS_QUANTIZATION=none"
    names = [name for name in KERNELS if name.startswith(quantization)]
    if not any(products.available(name) for name in names):
        return (
            f"{setting}: torch {torch.__version__} has no such products for this processor; set TTS_QUANTIZATION=none"
        )
    return None


def _kept(shapes: Shapes, dtype: torch.dtype, path: Path | None) -> Outcome:
    """The outcome of the trial of these shapes, from the file or made now."""
    names = [name for name in _CANDIDATES if _possible(name, dtype)]

    def find(before: Outcome | None) -> Outcome:
        start = time.perf_counter()
        outcome = trial(shapes, dtype, names, Clocks(), before)
        took = f"{1000 * (time.perf_counter() - start):.0f}"
        log.info("products_tried", fastest=outcome.fastest, quiet=outcome.quiet, took_ms=took)
        return outcome

    return kept(path, (str(dtype), sorted(set(shapes)), names, _PROMPT_ROWS), find)


def kept(path: Path | None, question: tuple[object, ...], find: Callable[[Outcome | None], Outcome]) -> Outcome:
    """The outcome that the file has for this `question` on this machine; else that of `find`, which goes there.

    The file's outcome is given to `find` if it is not quiet, and stays until a trial is: an order that changes at each
    load would change samples.
    """
    key = repr((_machine(), torch.__version__, torch.get_num_threads(), *question))
    outcomes = _read(path)
    before = outcomes.get(key)
    if before is not None and before.quiet:
        return before
    found = find(before)
    if before is not None and not found.quiet:
        return before
    outcomes[key] = found
    _write(path, dict(list(outcomes.items())[-MAX_KEPT:]))
    return found


def _possible(name: str, dtype: torch.dtype) -> bool:
    if name == "packed":
        return products.packs(dtype)
    if name == "plain":
        return products.plain_is_batch_invariant(dtype)
    return dtype == torch.float32 and products.available(name)


@torch.inference_mode()
def trial(
    shapes: Shapes, dtype: torch.dtype, names: Sequence[str], clocks: Clocks, before: Outcome | None = None
) -> Outcome:
    """Try the kernels on weights of these shapes: their bits on each shape, their time on one of them.

    `before`: an earlier outcome, whose bits need no trial.
    """
    multiples = before.row_multiples if before else _row_multiples(names, shapes, dtype)
    middle = sorted(shapes, key=lambda shape: shape[0] * shape[1])[len(shapes) // 2]
    times = {name: _seconds(name, multiples[name], middle, dtype, clocks) for name in names}
    quiet = all(alone for _, alone in times.values())
    return Outcome(sorted(names, key=lambda name: times[name][0]), multiples, quiet)


def _row_multiples(names: Sequence[str], shapes: Shapes, dtype: torch.dtype) -> dict[str, int]:
    """For each kernel, how many rows it needs to be batch invariant."""
    tried = {name: _row_multiple(name, shapes, dtype) for name in names if name in ("packed", "fp16")}
    return {name: tried.get(name.removesuffix("_threaded"), BATCH_MULTIPLE) for name in names}


def _row_multiple(name: str, shapes: Shapes, dtype: torch.dtype) -> int:
    """1 if a row alone has the bits that it has in company, for every shape; else BATCH_MULTIPLE."""
    for outputs, inputs in sorted(set(shapes)):
        kernel = KERNELS[name](_cancelling(outputs, inputs, dtype, 1))
        x = _cancelling(_ROWS, inputs, dtype, -1)
        alone = torch.cat([kernel(row[None]) for row in x[:4]])
        if not all(torch.equal(kernel(x[:rows])[:4], alone[:rows]) for rows in (2, 3, 4, _ROWS)):
            return BATCH_MULTIPLE
        for rows, first in _PROMPT_ROWS:
            x = _cancelling(rows, inputs, dtype, -1)
            if not torch.equal(kernel(x), torch.cat((kernel(x[:first]), kernel(x[first:])))):
                return BATCH_MULTIPLE
    return 1


def _seconds(name: str, rows: int, shape: tuple[int, int], dtype: torch.dtype, clocks: Clocks) -> tuple[float, bool]:
    """The least time of some rounds, and whether that round was quiet.

    A round has `_COPIES` products with different weights, so that few of them are in the cache.
    """
    weight = torch.ones(shape, dtype=dtype)
    kernels = [KERNELS[name](weight.clone()) for _ in range(_COPIES)]
    x = _values(rows, shape[1], dtype)
    least, quiet = math.inf, False
    for number in range(1, _MOST_ROUNDS + 1):
        start, cpu_start = clocks.wall(), clocks.cpu()
        for kernel in kernels:
            kernel(x)
        took, computed = clocks.wall() - start, clocks.cpu() - cpu_start
        if took < least:
            least, quiet = took, computed >= _QUIET * took
        if quiet and number >= _ROUNDS:
            break
    return least, quiet


def _values(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Values within -1 to 1 without a pattern. Random ones would take as long as the trial."""
    return torch.sin(torch.arange(rows * columns).float().square_().remainder_(9973)).view(rows, columns).to(dtype)


def _cancelling(rows: int, columns: int, dtype: torch.dtype, sign: int) -> Tensor:
    """Such values whose second half is the first one reversed, times `sign`.

    Products of both signs are what rounding leaves, so all of them show the order of a sum. Of other values, bfloat16
    rounds that away but in a few of ten thousand.
    """
    half = _values(rows, columns // 2, dtype)
    return torch.cat((half, sign * half.flip(1)), 1)


@functools.cache
def _machine() -> str:
    """The identity of the processor: two with one name may have other instructions in a virtual machine."""
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features")
    lines: list[str] = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        lines = [line for line in text.splitlines() if line.partition("\t")[0].strip() in wanted]
    isa = (os.environ.get(name, "") for name in _ISA_VARIABLES)
    return hashlib.sha256("\n".join((*lines, *isa, *os.uname()[-1:])).encode()).hexdigest()[:16]


def _read(path: Path | None) -> dict[str, Outcome]:
    """The outcomes in the file; empty if it is missing, too large or damaged."""
    if path is not None:
        with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError), path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=dict[str, Outcome])
    return {}


def _write(path: Path | None, outcomes: dict[str, Outcome]) -> None:
    """Replace the file. Where it cannot be written, the next process makes the trial again."""
    if path is None:
        return
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(msgspec.json.encode(outcomes))
        scratch.replace(path)
    except OSError as error:
        log.info("products_trial_not_kept", reason=str(error))
