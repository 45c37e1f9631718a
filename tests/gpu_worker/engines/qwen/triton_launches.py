"""Launches of Triton kernels without a GPU: recorded, and compiled for one that is not there."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
MAX_GRID = (1 << 31, 1 << 16, 1 << 16)
"""The largest grid that CUDA allows."""

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    bool: "i1",
    int: "i32",
    float: "fp32",
}
"""Triton's names of types."""


class Launch(msgspec.Struct, frozen=True):
    """A kernel and what it was launched with."""

    kernel: Any
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The name of the operation."""
        return self.kernel.fn.__module__.rpartition(".")[2]

    def compile(self) -> int:
        """Compile it for HOPPER, to so many bytes of machine code. The interpreter takes more than can be compiled."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        aligned: dict[tuple[int], Any] = {}
        for index, (parameter, value) in enumerate(zip(self.kernel.params, self.arguments, strict=True)):
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[index,] = value
            elif isinstance(value, Tensor):
                signature[parameter.name] = f"*{TYPES[value.dtype]}"
                aligned[index,] = [["tt.divisibility", 16]]
            else:
                signature[parameter.name] = TYPES[type(value)]
        source = ASTSource(self.kernel, signature, constants, aligned)
        return len(triton.compile(source, target=HOPPER, options={"enable_fp_fusion": False}).asm["cubin"])


@contextlib.contextmanager
def recorded(launched: Callable[[Launch], None]) -> Iterator[None]:
    """Call `launched` in the place of each launch."""

    def run(kernel: Any, *arguments: Any, grid: tuple[int, ...], enable_fp_fusion: bool, **_: Any) -> None:
        launch = Launch(kernel, arguments)
        assert not enable_fp_fusion, f"{launch.name} may join products and sums"
        assert all(1 <= size < most for size, most in zip(grid, MAX_GRID, strict=False)), f"{launch.name}: {grid}"
        launched(launch)

    original = triton.JITFunction.run
    triton.JITFunction.run = run
    try:
        yield
    finally:
        triton.JITFunction.run = original
