"""The choice between torch and Triton: made once when an engine is opened, for each operation."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
import structlog
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.faults import is_out_of_memory
from gpu_worker.engines.qwen.kernels.add_norm import AddNorm, add_norm
from gpu_worker.engines.qwen.kernels.bias_snake import BiasSnake, bias_snake
from gpu_worker.engines.qwen.kernels.causal_input import CausalInput, causal_input
from gpu_worker.engines.qwen.kernels.embed_frame import EmbedFrame, embed_frame
from gpu_worker.engines.qwen.kernels.frame_attention import FrameAttention
from gpu_worker.engines.qwen.kernels.next_codebook0 import NextCodebook0, next_codebook0
from gpu_worker.engines.qwen.kernels.quantized_linear import (
    QuantizedLinear,
    fp8_disagreement,
    int8_disagreement,
    quantized_linear,
)
from gpu_worker.engines.qwen.kernels.rotate_and_cache import RotateAndCache, rotate_and_cache
from gpu_worker.engines.qwen.kernels.sample_code import SampleCode, sample_code
from gpu_worker.engines.qwen.kernels.silu_mul import SiluMul, silu_mul

KernelSetting = Literal["auto", "torch", "triton"]

NO_TRITON: Final = "the package triton is not installed; use auto or torch"

log = structlog.get_logger(__name__)


class Kernels(msgspec.Struct, frozen=True, kw_only=True):
    """The functions that an engine computes with: plain torch, but for those whose Triton kernel was chosen."""

    add_norm: AddNorm = add_norm
    bias_snake: BiasSnake = bias_snake
    causal_input: CausalInput = causal_input
    embed_frame: EmbedFrame = embed_frame
    frame_attention: FrameAttention | None = None
    """None: FrameCache and the attention backend do it."""
    next_codebook0: NextCodebook0 = next_codebook0
    rotate_and_cache: RotateAndCache = rotate_and_cache
    sample_code: SampleCode = sample_code
    silu_mul: SiluMul = silu_mul


OPERATIONS: Final = Kernels.__struct_fields__


def fused_kernels(*left_out: str) -> Kernels:
    """The Triton kernels of all operations but those left out. It imports Triton, and compiles nothing yet."""
    return Kernels(**{name: _fused(name) for name in OPERATIONS if name not in left_out})


def select_kernels(setting: KernelSetting, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels of `setting`. "auto" takes on CUDA those Triton kernels that compile and agree with torch.

    Call it outside of captures: the first call for a device and dtype compiles and compares.

    Raises:
        JobError: `model_unavailable` where "triton" was asked for and one of its kernels cannot be used.
    """
    if setting == "torch" or (setting == "auto" and device.type != "cuda"):
        return Kernels()
    if device.type != "cuda":
        raise JobError("model_unavailable", "TTS_KERNELS=triton needs a CUDA device; use auto or torch")
    if importlib.util.find_spec("triton") is None:
        if setting == "triton":
            raise JobError("model_unavailable", f"TTS_KERNELS=triton is impossible here: {NO_TRITON}")
        log.warning("kernels_left_out", reason=NO_TRITON)
        return Kernels()
    problems = {name: problem for name in OPERATIONS if (problem := _problem(name, device, dtype))}
    if problems and setting == "triton":
        reasons = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise JobError("model_unavailable", f"TTS_KERNELS=triton is impossible here, use auto or torch: {reasons}")
    log.info("kernels_chosen", triton=[name for name in OPERATIONS if name not in problems], torch=[*problems])
    return fused_kernels(*problems)


def quantized_linear_on(device: torch.device) -> QuantizedLinear:
    """The product with quantised weights: on CUDA the Triton kernel, elsewhere its reference."""
    fused: QuantizedLinear = _fused("quantized_linear") if device.type == "cuda" else quantized_linear
    return fused


@functools.cache
def quantized_linear_problem(weights: torch.dtype, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel for weights of that dtype cannot be used; None if it can. One trial for the process."""
    disagreement = int8_disagreement if weights == torch.int8 else fp8_disagreement
    return _tried("quantized_linear", disagreement, device, dtype)


@functools.cache
def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel of an operation cannot be used; None if it can. One trial for the process."""
    return _tried(name, importlib.import_module(f"{__package__}.{name}").disagreement, device, dtype)


def _tried(name: str, disagreement: Callable[..., str | None], device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        problem = disagreement(_fused(name), device, dtype)
    except Exception as error:  # a compiler may fail in any way, and torch computes the same
        if is_out_of_memory(error):
            raise
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        log.warning("kernel_left_out", kernel=name, dtype=str(dtype), reason=problem)
    return problem


def _fused(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{__package__}.fused.{name}"), name)
