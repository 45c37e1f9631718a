"""Tests of kernels run in Triton's interpreter, in a child process.

Triton decides on import whether it interprets, so the process of the other tests must not import it that way.
"""

import atexit
import dataclasses
import functools
import gc
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

VARIABLE = "TRITON_INTERPRET"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton, which exists for Linux on x86-64"
)


def each_dtype(names: str, cases: Sequence[object]) -> pytest.MarkDecorator:
    """Parametrise by `dtype` and by the cases.

    float16 takes the path of bfloat16: `make test` has float16 for the first case alone, `make soak` for all.
    """
    made = []
    for place, case in enumerate(cases):
        values = case if "," in names and isinstance(case, tuple) else (case,)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            marks = (pytest.mark.soak,) if place and dtype == torch.float16 else ()
            made.append(pytest.param(dtype, *values, marks=marks, id=f"{dtype}-{case}"))
    return pytest.mark.parametrize(("dtype", *names.split(",")), made)


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of a module, with its parameters, in the child process. The test may import kernels.fused."""

    @needs_triton
    @functools.wraps(test)
    def wrapper(**parameters: object) -> None:
        if os.environ.get(VARIABLE) == "1":
            test(**parameters)
        else:
            _child().submit(wrapper, **parameters).result()

    return wrapper


@functools.cache
def _child() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_interpret)
    atexit.register(pool.shutdown)
    return pool


def _interpret() -> None:
    os.environ[VARIABLE] = "1"
    torch.set_num_threads(1)
    _make_quick()
    _correct_dot()
    gc.freeze()  # the interpreter makes many objects, and each collection would walk all of torch and Triton


def _make_quick() -> None:
    """Halve the interpreter's time: no look for overflows in each sum, no preparation of the language at each call."""
    from triton.runtime import interpreter  # noqa: PLC0415 -- the parent must not import it

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    prepare_and_call = interpreter.InterpretedFunction.__call__
    prepared = set()

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        if function in prepared:
            return function.rewrite()(*arguments, **named)
        prepared.add(function)
        return prepare_and_call(function, *arguments, **named)

    interpreter.InterpretedFunction.__call__ = call


def _correct_dot() -> None:
    """Multiply the values of bfloat16: the interpreter multiplies their bits, as integers.

    As tensor cores do, it computes products exactly, and rounds a sum to float32.
    """
    import numpy as np  # noqa: PLC0415 -- the parent does not need them
    import triton.language as tl  # noqa: PLC0415
    from triton.runtime import interpreter  # noqa: PLC0415

    def wide(operand: Any) -> Any:
        bits = operand.data
        if operand.dtype.scalar == tl.bfloat16:
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return bits.astype(np.float64)

    def dot(_: Any, left: Any, right: Any, total: Any, *__: Any) -> Any:
        result = np.matmul(wide(left), wide(right)) + total.data
        return interpreter.TensorHandle(result.astype(total.data.dtype), total.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot
