"""Engines on parts that all tests share."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.runtime.cpu_traces import CpuTraces
from tests.gpu_worker.engines.qwen.driving import kept_engine


@pytest.fixture(scope="session", autouse=True)
def _traces_with_short_stacks() -> Iterator[None]:
    """Trace in a thread of its own: torch walks the whole Python stack for each operator, and pytest's is deep.

    The trace of a small frame takes 0.2 s instead of 0.5.
    """
    trace = CpuTraces._trace

    def in_thread(*arguments: Any) -> Any:
        inference = torch.is_inference_mode_enabled()

        def traced() -> Any:
            with torch.inference_mode(inference):
                return trace(*arguments)

        return thread.submit(traced).result()

    with ThreadPoolExecutor(1) as thread, pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuTraces, "_trace", in_thread)
        yield


@pytest.fixture
def speaker() -> Iterator[QwenEngine]:
    """A CustomVoice engine with four slots. The test must leave it idle."""
    made = kept_engine("custom_voice")
    yield made
    assert made.capacity() == 4
    assert not made.runnable(())


@pytest.fixture
def cloner() -> Iterator[QwenEngine]:
    """A Base engine with four slots. The test must leave it idle."""
    made = kept_engine("base")
    yield made
    assert made.capacity() == 4
