"""The choice of an engine's kernels, on a device that only claims to be CUDA."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import structlog
import torch

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.kernels import selection
from gpu_worker.engines.qwen.kernels.selection import OPERATIONS, Kernels, fused_kernels, select_kernels
from tests.gpu_worker.engines.qwen.kernels.interpreter import interpreted

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reference_of(name: str) -> Any:
    """The plain torch function of an operation."""
    return getattr(importlib.import_module(f"gpu_worker.engines.qwen.kernels.{name}"), name)


def _fused(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Any], Any]) -> None:
    """Put functions in the place of Triton kernels, `change(name, reference)`, and try them on the CPU."""
    problem = selection._problem.__wrapped__
    monkeypatch.setattr(selection, "_problem", functools.cache(lambda name, _, dtype: problem(name, CPU, dtype)))
    monkeypatch.setattr(selection, "_fused", lambda name: change(name, reference_of(name)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


@pytest.mark.parametrize("setting", ["auto", "torch"])
def test_a_cpu_computes_with_torch(setting: selection.KernelSetting) -> None:
    """The very functions that ran before there were kernels."""
    assert select_kernels(setting, CPU, torch.float32) == Kernels()
    assert select_kernels("torch", CUDA, torch.bfloat16) == Kernels()


def test_triton_is_refused_on_a_cpu() -> None:
    """In one sentence, with what to do."""
    with pytest.raises(JobError, match="TTS_KERNELS=triton needs a CUDA device; use auto or torch") as caught:
        select_kernels("triton", CPU, torch.float32)
    assert caught.value.code == "model_unavailable"


def test_without_triton_torch_computes_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting auto warns once an engine; the setting triton is refused."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with structlog.testing.capture_logs() as logs:
        assert select_kernels("auto", CUDA, torch.bfloat16) == Kernels()
    assert [(one["event"], one["log_level"]) for one in logs] == [("kernels_left_out", "warning")]
    with pytest.raises(JobError, match="the package triton is not installed"):
        select_kernels("triton", CUDA, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_that_agree_are_taken(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Each is tried once, for "auto" and for "triton"."""
    made: dict[str, Any] = {}

    def wrapped(name: str, reference: Any) -> Any:
        return made.setdefault(name, functools.partial(reference))

    _fused(monkeypatch, wrapped)
    for setting in ("auto", "triton"):
        kernels = select_kernels(setting, CUDA, dtype)  # type: ignore[arg-type]
        assert all(getattr(kernels, name) is made[name] for name in OPERATIONS)


@pytest.mark.parametrize("left_out", OPERATIONS)
def test_a_kernel_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    """One that does not compile, or gives other numbers: torch computes that operation alone, with one warning."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C compiler")

    _fused(monkeypatch, lambda name, reference: fails if name == left_out else reference)
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            kernels = select_kernels("auto", CUDA, torch.bfloat16)
    assert getattr(kernels, left_out) is getattr(Kernels(), left_out)
    warnings = [one for one in logs if one["log_level"] == "warning"]
    assert [(one["event"], one["kernel"], one["reason"]) for one in warnings] == [
        ("kernel_left_out", left_out, "RuntimeError: no C compiler")
    ]
    assert [one["torch"] for one in logs if one["event"] == "kernels_chosen"] == [[left_out]] * 2
    with pytest.raises(JobError, match=f"impossible here, use auto or torch: {left_out}: RuntimeError: no C compiler"):
        select_kernels("triton", CUDA, torch.bfloat16)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kernel_that_disagrees_is_left_out(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its results are two units in the last place larger."""

    def wrong(result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(wrong(one) for one in result)
        return result * (1 + 2**-6) if result.is_floating_point() else result + 1

    _fused(monkeypatch, lambda _, reference: lambda *args, **kwargs: wrong(reference(*args, **kwargs)))
    with structlog.testing.capture_logs() as logs:
        select_kernels("auto", CUDA, torch.bfloat16)
    assert name in {one["kernel"] for one in logs if "differs" in one.get("reason", "")}


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.soak)], ids=str)
def test_the_check_at_start_passes_in_the_interpreter(dtype: torch.dtype) -> None:
    """Every kernel agrees with torch over the values that an engine compares when it is opened."""
    for name in OPERATIONS:
        assert selection._problem(name, CPU, dtype) is None
    assert all(getattr(fused_kernels(), name) is not getattr(Kernels(), name) for name in OPERATIONS)
